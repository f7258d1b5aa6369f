"""Any layout to any other: what ranks of one wrote, the ranks of the other find, element for element. No processes."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deepspeed.checkpoint.directory import Attempt
from deepspeed.checkpoint.reader import WEIGHT, CheckpointReader, piece_name
from deepspeed.checkpoint.writer import Piece, Pieces
from deepspeed.memory.layout import FlatLayout, ParameterSpec

KINDS = (WEIGHT, "exp_avg")

models = st.lists(st.lists(st.integers(0, 9), max_size=3).map(tuple), min_size=1, max_size=6)
layouts = st.fixed_dictionaries(
    {
        "shards": st.integers(1, 6),
        "bucket_numel": st.integers(0, 400),
        "units": st.sampled_from([(None,), (0,), (0, 1), (None, 1, 2)]),
        "dtype": st.sampled_from(["float32", "bfloat16"]),
    }
)


def laid_out(shapes: list[tuple[int, ...]], choice: dict[str, Any]) -> FlatLayout:
    """A stage, in units or without, in a precision, on a number of ranks."""
    units = choice["units"]
    specs = [ParameterSpec(f"p{i}", shape, choice["dtype"], 0, units[i % len(units)]) for i, shape in enumerate(shapes)]
    return FlatLayout.build(specs, shards=choice["shards"], bucket_numel=choice["bucket_numel"])


def pieces_of(layout: FlatLayout, rank: int, values: dict[tuple[str, str], Tensor]) -> list[Pieces]:
    return [
        Pieces(
            {
                piece_name(kind, f.spec.name, f.parameter_start): Piece(
                    values[kind, f.spec.name], slice(f.parameter_start, f.parameter_start + f.numel)
                )
                for f in bucket.fragments(rank)
                for kind in KINDS
            }
        )
        for bucket in layout.buckets
    ]


@settings(max_examples=20, deadline=None)
@given(models, layouts, layouts)
def test_what_one_layout_wrote_any_other_reads_element_for_element(shapes, there, here):
    written, wanted = laid_out(shapes, there), laid_out(shapes, here)
    values = {(kind, f"p{i}"): torch.randn(torch.Size(shape).numel()) for i, shape in enumerate(shapes) for kind in KINDS}
    with tempfile.TemporaryDirectory() as folder:
        attempt = Attempt(Path(folder), "any", written.shards)
        claim = attempt.begin()
        done = [attempt.write(rank, pieces_of(written, rank, values)) for rank in range(written.shards)]
        attempt.publish({"shapes": {f"p{i}": shape for i, shape in enumerate(shapes)}}, done)
        claim.release()
        with CheckpointReader(Path(folder) / "any") as reader:
            reader.verify_all()
            for rank in range(wanted.shards):
                for bucket in wanted.buckets:
                    for f in bucket.fragments(rank):
                        for kind in KINDS:
                            parts = reader.parts(kind, f.spec.name, f.parameter_start, f.numel)
                            found = torch.cat([reader.read_part(part) for part in parts])
                            expected = values[kind, f.spec.name][f.parameter_start : f.parameter_start + f.numel]
                            assert torch.equal(found, expected)
