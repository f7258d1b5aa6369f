from __future__ import annotations

from pathlib import Path

import pytest
import torch

from deepspeed.ops import __compatible_ops__
from deepspeed.ops.aio import AsyncIOBuilder
from deepspeed.ops.op_builder import AsyncIOBuilder as SameBuilder


def test_the_documented_handle_reads_what_it_wrote(tmp_path: Path) -> None:
    handle = AsyncIOBuilder().load().aio_handle(65536, 16, True, True, 2)
    written = [handle.new_cpu_locked_tensor(1000, torch.empty(0)).normal_() for _ in range(3)]
    for index, tensor in enumerate(written):
        assert handle.async_pwrite(tensor, str(tmp_path / f"{index}")) == 0
    assert handle.wait() == 3 and handle.wait() == 0
    found = torch.empty(1000)
    for index, tensor in enumerate(written):
        assert handle.sync_pread(found, tmp_path / f"{index}") == 1
        assert torch.equal(found, tensor)
    assert handle.sync_pwrite(torch.ones(10), tmp_path / "0", 4) == 1
    assert handle.async_pread(found[:11], tmp_path / "0") == 0
    handle.wait()
    assert found[0] == written[0][0] and torch.equal(found[1:11], torch.ones(10))
    assert handle.free_cpu_locked_tensor(written[0])


def test_the_documented_handle_says_what_it_was_made_with() -> None:
    handle = AsyncIOBuilder().load().aio_handle(65536, 16, True, False, 2)
    assert (handle.get_block_size(), handle.get_queue_depth(), handle.get_intra_op_parallelism()) == (65536, 16, 2)
    assert handle.get_single_submit() is True and handle.get_overlap_events() is False


def test_a_read_of_the_handle_that_fails_is_an_error_of_its_wait(tmp_path: Path) -> None:
    handle = AsyncIOBuilder().load().aio_handle()
    with pytest.raises(FileNotFoundError, match="missing"):
        handle.sync_pread(torch.empty(10), tmp_path / "missing")
    (tmp_path / "short").write_bytes(b"abc")
    handle.async_pread(torch.empty(10), tmp_path / "short")
    with pytest.raises(OSError, match="the file ends at byte 3"):
        handle.wait()


def test_integrations_find_that_the_operation_works() -> None:
    assert SameBuilder is AsyncIOBuilder
    assert __compatible_ops__[AsyncIOBuilder.NAME] is AsyncIOBuilder().is_compatible() is True
