"""Reading: which pieces hold a range, and what is not as it was saved."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from deepspeed.checkpoint.directory import CheckpointError, checksum, file_name, index_checksum
from deepspeed.checkpoint.reader import WEIGHT, CheckpointReader, Part, piece_name
from deepspeed.checkpoint.writer import header_hash
from tests.checkpoint.saving import is_saved, load, save


def written(path: Path, ranks: list[dict[str, Tensor]]) -> Path:
    """A checkpoint of what each rank had."""
    path.mkdir()
    files = {}
    for rank, tensors in enumerate(ranks):
        file = path / file_name(rank)
        save_file(tensors, file, metadata={name: checksum(tensor) for name, tensor in tensors.items()})
        content = file.read_bytes()
        header = header_hash(content[: 8 + int.from_bytes(content[:8], "little")])
        files[file.name] = {"nbytes": len(content), "header": header}
    index = {
        "format": "deepspeed-fragments",
        "version": 2,
        "ranks": len(ranks),
        "files": files,
        "shapes": {"a": [10], "b": [2, 2], "none": [0]},
    }
    (path / "index.json").write_text(json.dumps({**index, "checksum": index_checksum(index)}))
    return path


RANKS = [
    {"weight/a@0": torch.arange(4.0), "weight/b@0": torch.arange(4.0), "step/a@0": torch.ones(10)},
    {"weight/a@4": torch.arange(4.0, 7.0), "weight/a@7": torch.arange(7.0, 10.0)},
]


def test_a_range_is_found_in_its_pieces_whoever_wrote_them(tmp_path):
    with CheckpointReader(written(tmp_path / "c", RANKS)) as reader:
        assert reader.parts(WEIGHT, "a", 2, 6) == [
            Part("weight/a@0", 2, 2),
            Part("weight/a@4", 0, 3),
            Part("weight/a@7", 0, 1),
        ]
        assert reader.parts(WEIGHT, "a", 5, 1) == [Part("weight/a@4", 1, 1)]
        assert reader.parts(WEIGHT, "a", 5, 0) == reader.parts(WEIGHT, "none", 0, 0) == []
        assert torch.equal(reader.read_part(Part("weight/a@4", 1, 2)), torch.tensor([5.0, 6.0]))
        assert torch.equal(reader.whole("a"), torch.arange(10.0))
        assert torch.equal(reader.whole("b"), torch.arange(4.0).view(2, 2))
        assert reader.whole("none").shape == (0,)
        assert reader.kinds("a") == {WEIGHT, "step"} and reader.kinds("b") == {WEIGHT} and reader.kinds("c") == set()


@settings(max_examples=30, deadline=None)
@given(st.data(), st.lists(st.integers(1, 5), min_size=1, max_size=5))
def test_any_range_of_any_pieces_is_read_as_it_was(tmp_path_factory, data, sizes):
    values = torch.arange(float(sum(sizes)))
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    ranks = [{piece_name(WEIGHT, "a", start): values[start : start + size]} for start, size in zip(starts, sizes, strict=True)]
    first = data.draw(st.integers(0, sum(sizes)))
    numel = data.draw(st.integers(0, sum(sizes) - first))
    with CheckpointReader(written(tmp_path_factory.mktemp("c") / "c", data.draw(st.permutations(ranks)))) as reader:
        parts = [reader.read_part(part) for part in reader.parts(WEIGHT, "a", first, numel)]
    assert torch.equal(torch.cat([*parts, torch.empty(0)]), values[first : first + numel])


@pytest.mark.parametrize(("kind", "name", "start", "numel"), [(WEIGHT, "a", 8, 3), ("step", "b", 0, 1), (WEIGHT, "c", 0, 1)])
def test_a_range_that_nobody_wrote_is_named(tmp_path, kind, name, start, numel):
    with (
        CheckpointReader(written(tmp_path / "c", RANKS)) as reader,
        pytest.raises(CheckpointError, match=f"lacks the elements .* of {kind}/{name}"),
    ):
        reader.parts(kind, name, start, numel)


def test_a_gap_between_pieces_is_named(tmp_path):
    gap = [RANKS[0], {"weight/a@7": torch.arange(3.0)}]
    with CheckpointReader(written(tmp_path / "c", gap)) as reader, pytest.raises(CheckpointError, match="4 to 9 of weight/a"):
        reader.parts(WEIGHT, "a", 0, 10)


def test_a_flipped_bit_is_found_in_any_piece_and_named(tmp_path):
    save(tmp_path, "first", 1.0)
    file = tmp_path / "first" / file_name(0)
    whole = file.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    offsets = {name: entry["data_offsets"] for name, entry in json.loads(whole[8:header]).items() if name != "__metadata__"}
    assert len(offsets) == len(load_file(file)) == 4
    for name, (start, stop) in offsets.items():
        for at in (header + start, header + stop - 1):
            damaged = bytearray(whole)
            damaged[at] ^= 64
            file.write_bytes(damaged)
            with pytest.raises(CheckpointError, match=rf"rank_00000.safetensors is damaged: the checksum of {name} is not"):
                load(tmp_path / "first")


@pytest.mark.parametrize("name", ["index.json", file_name(0)])
def test_no_flipped_bit_goes_unnoticed_and_changes_a_value(tmp_path, name):
    """Each byte in turn, or every fifth: the checkpoint is refused. An index may also say the same in other words."""
    save(tmp_path, "first", 1.0)
    file = tmp_path / "first" / name
    whole = file.read_bytes()
    refused = 0
    places = range(0, len(whole), 1 if len(whole) < 3000 else 5)
    for at in places:
        damaged = bytearray(whole)
        damaged[at] ^= 1 << (at % 7)
        file.write_bytes(damaged)
        try:
            assert is_saved(load(tmp_path / "first"), 1.0), f"byte {at}: {whole[at - 20 : at + 20]!r}"
        except CheckpointError:
            refused += 1
    assert refused == len(places) if name == file_name(0) else refused > len(places) / 2


def test_a_file_cut_short_is_named(tmp_path):
    save(tmp_path, "first", 1.0)
    for name in (file_name(0), "index.json"):
        whole = (tmp_path / "first" / name).read_bytes()
        for length in (0, 5, len(whole) // 2, len(whole) - 1):
            (tmp_path / "first" / name).write_bytes(whole[:length])
            with pytest.raises(CheckpointError, match=name):
                load(tmp_path / "first")
        (tmp_path / "first" / name).write_bytes(whole)
    assert is_saved(load(tmp_path / "first"), 1.0)


def test_what_is_no_checkpoint_is_answered_by_what_lies_there(tmp_path):
    (tmp_path / "model.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"index.json is missing.* holds model.pt"):
        CheckpointReader(tmp_path)
    (tmp_path / "index.json").write_text('{"format": "other"}')
    with pytest.raises(CheckpointError, match="is not the index of a deepspeed-fragments checkpoint"):
        CheckpointReader(tmp_path)
    (tmp_path / "index.json").write_text('{"format": "deepspeed-fragments", "version": 1}')
    with pytest.raises(CheckpointError, match="version 2"):
        CheckpointReader(tmp_path)
