"""Files of weights: one tensor is in memory, whatever the size of the model."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file

from deepspeed.checkpoint import weight_files
from deepspeed.checkpoint.weight_files import Weight, write_weights

NUMEL = 1000


@pytest.mark.parametrize("limit", [None, 10_000])
def test_no_more_than_one_tensor_is_in_memory_at_a_time(tmp_path, monkeypatch, limit):
    present: list[torch.Tensor] = []
    most = 0

    def load(value: float, target: torch.Tensor) -> None:
        nonlocal most
        target.fill_(value)
        present.append(target)
        most = max(most, sum(tensor.untyped_storage().nbytes() for tensor in present))

    weights = [Weight((f"w{i}",), (NUMEL,), torch.float32, lambda target, i=i: load(i, target)) for i in range(8)]
    files = write_weights(tmp_path / "model.safetensors", weights, limit)
    assert len(present) == 8 and most == 4 * NUMEL
    found = {name: value for file in files for name, value in load_file(file).items()}
    assert all(torch.equal(found[f"w{i}"], torch.full((NUMEL,), float(i))) for i in range(8))
    assert len(files) == (1 if limit is None else 4)


def test_tensors_of_a_pickle_are_in_files_until_it_is_written(tmp_path, monkeypatch):
    shapes = []
    real = weight_files.scratch

    @contextmanager
    def counted(folder):
        with real(folder) as empty:
            yield lambda shape, dtype: shapes.append(shape) or empty(shape, dtype)

    monkeypatch.setattr(weight_files, "scratch", counted)
    weights = [Weight((n,), s, torch.float32, lambda t: t.fill_(2)) for n, s in (("a", (3, 2)), ("b", ()), ("c", (0,)))]
    write_weights(tmp_path / "x" / "pytorch_model.bin", weights)
    found = torch.load(tmp_path / "x" / "pytorch_model.bin")
    assert {name: tuple(value.shape) for name, value in found.items()} == {"a": (3, 2), "b": (), "c": (0,)}
    assert torch.equal(found["a"], torch.full((3, 2), 2.0)) and shapes == [(3, 2), (), (0,)]
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["pytorch_model.bin"]
