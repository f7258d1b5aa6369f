from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from deepspeed.memory.tiers import Chunk, Evictable, FileTier, Residence

NUMEL = 10_000


@pytest.fixture
def tier(tmp_path: Path) -> Iterator[FileTier]:
    tier = FileTier(tmp_path)
    assert not list(tmp_path.iterdir()), "the file has no name"
    yield tier


class Failing:
    """A file on which nothing can be read or written."""

    def submit_read(self, tensor: Any, offset: int) -> Failing:
        return self

    submit_write = submit_read

    def wait(self) -> None:
        raise OSError(errno.ENOSPC, "no space")


def failing(evictable: Evictable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evictable, "_file", Failing())


def test_an_evicted_tensor_has_no_memory_and_finds_its_values_again_in_all_views(tier):
    tensor = torch.arange(float(NUMEL))
    part = tensor[100:200]
    evictable = tier.evictable(tensor)
    assert tier.evictable(part) is evictable
    evictable.evict()
    assert tensor.untyped_storage().nbytes() == 0 and evictable.residence is Residence.FILE
    evictable.fetch()
    assert torch.equal(tensor, torch.arange(float(NUMEL))) and torch.equal(part, tensor[100:200])
    tensor.zero_()
    evictable.drop()  # as it was read
    evictable.fetch()
    assert torch.equal(tensor, torch.arange(float(NUMEL)))


def test_what_is_on_its_way_is_waited_for_by_whoever_wants_something_else(tier):
    tensor = torch.arange(float(NUMEL))
    evictable = tier.evictable(tensor)
    evictable.start_evict()
    evictable.start_fetch()
    assert evictable.residence is Residence.MEMORY and tensor[-1] == NUMEL - 1
    evictable.evict()
    evictable.start_fetch()
    evictable.start_evict()
    evictable.evict()
    target = torch.empty(NUMEL)
    transfer = evictable.start_copy(target)
    assert transfer is not None
    transfer.wait()
    assert torch.equal(target, torch.arange(float(NUMEL)))
    evictable.claim()
    tensor.fill_(1)
    assert evictable.start_copy(target) is None and target.eq(1).all()


def test_a_write_that_fails_loses_nothing(tier, monkeypatch):
    tensor = torch.arange(float(NUMEL))
    evictable = tier.evictable(tensor)
    with monkeypatch.context() as patch:
        failing(evictable, patch)
        for _ in range(2):
            with pytest.raises(OSError, match="no space"):
                evictable.evict()
            assert evictable.residence is Residence.MEMORY and torch.equal(tensor, torch.arange(float(NUMEL)))
    evictable.evict()
    assert tensor.untyped_storage().nbytes() == 0


def test_a_read_that_fails_can_be_tried_again(tier, monkeypatch):
    tensor = torch.arange(float(NUMEL))
    evictable = tier.evictable(tensor)
    evictable.evict()
    with monkeypatch.context() as patch:
        failing(evictable, patch)
        with pytest.raises(OSError, match="no space"):
            evictable.fetch()
        assert tensor.untyped_storage().nbytes() == 0
    evictable.fetch()
    assert torch.equal(tensor, torch.arange(float(NUMEL)))


def test_a_chunk_is_in_memory_while_somebody_reads_it_and_keeps_what_is_changed(tier):
    tensors = [torch.zeros(NUMEL), torch.ones(NUMEL)]
    chunk = Chunk()
    chunk.include(lambda: [tier.evictable(tensor) for tensor in tensors])
    chunk.evict()
    with chunk.reading(), chunk.reading():
        assert tensors[1].eq(1).all()
        tensors[0].fill_(5)
    assert not any(tensor.untyped_storage().nbytes() for tensor in tensors)
    with chunk.changing():
        assert tensors[0].eq(0).all(), "what was changed while it was only read is forgotten"
        tensors[0].fill_(7)
        tensors.append(torch.full((NUMEL,), 3.0))  # it moves with the others from now on
    assert not any(tensor.untyped_storage().nbytes() for tensor in tensors)
    with chunk.reading():
        assert tensors[0].eq(7).all() and tensors[2].eq(3).all()


def test_a_place_that_is_given_up_goes_back_to_the_file_system(tier):
    tensor = torch.ones(1 << 20)
    tier.evictable(tensor).evict()
    descriptor = tier._file._file.target.buffered
    os.fsync(descriptor)
    before = os.fstat(descriptor).st_blocks
    tier.forget(tensor)
    assert before >= (4 << 20) // 512 and os.fstat(descriptor).st_blocks < before // 2
