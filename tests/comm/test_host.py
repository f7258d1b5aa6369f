from __future__ import annotations

import errno
import logging
import os
import time
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from deepspeed.comm import host
from deepspeed.comm.communicator import Communicator
from deepspeed.native.hosts import HostGroup, Kind, PeerError, SharedMemory, Sum, slot_nbytes
from tests.comm.test_communicator import values

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def communicators() -> tuple[Communicator, Communicator]:
    """One through memory and one that is not."""
    through = Communicator()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(host.SWITCH, "0")
        other = Communicator(dist.new_group())
    assert host.host_group(through.group) is not None and host.host_group(other.group) is None
    return through, other


def results(communicator: Communicator, numel: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    size, rank = communicator.size, communicator.rank
    found = {name: values(rank, numel * size, dtype) for name in ("reduced", "gathered", "broadcast", "summed")}
    found["added"] = torch.ones(numel, dtype=torch.promote_types(dtype, torch.float32))
    found["scattered"], found["exchanged"] = torch.empty(numel, dtype=dtype), torch.empty(numel * size, dtype=dtype)
    kept = values(rank, numel * size, dtype)
    whole = kept.clone() if rank == 1 else None
    pending = [
        communicator.reduce_scatter(found["reduced"], scale=1 / 3),
        communicator.reduce_scatter(kept.clone(), out=found["added"], scale=0.5, accumulate=True),
        communicator.all_gather(found["gathered"]),
        communicator.broadcast(found["broadcast"], source=size - 1),
        communicator.scatter(whole, found["scattered"], source=1),
        communicator.all_to_all(kept, found["exchanged"]),
    ]
    if size == 2 or dtype in (torch.float32, torch.float64):
        # Of 16-bit values gloo rounds each partial sum.
        pending.append(communicator.all_reduce(found["summed"], scale=1 / 3))
    for operation in reversed(pending):
        operation.wait()
    found["reduced"] = found["reduced"].chunk(size)[rank]
    return found


def the_same_both_ways(dtype: torch.dtype) -> None:
    through, other = communicators()
    share = slot_nbytes(through.size) // through.size // dtype.itemsize
    for numel in (1, 77, 5 * share + 3):
        ours, theirs = (results(communicator, numel, dtype) for communicator in (through, other))
        for name, tensor in ours.items():
            if name == "summed" and through.size > 2:
                torch.testing.assert_close(tensor, theirs[name])
            else:
                assert torch.equal(tensor, theirs[name]), f"{name} of {numel}"


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_memory_and_sockets_give_the_same_bits(ranks, size, dtype):
    ranks(size, the_same_both_ways, dtype)


def sum_in_two_phases() -> None:
    communicator = Communicator()
    buffer = values(communicator.rank, 2 * slot_nbytes(communicator.size) + 5, torch.bfloat16)
    expected = sum(values(rank, buffer.numel(), torch.bfloat16).float() for rank in range(communicator.size))
    communicator.all_reduce(buffer).wait()
    assert torch.equal(buffer, expected.bfloat16())


def test_an_all_reduce_of_16_bit_values_is_summed_in_fp32_in_rank_order(ranks):
    ranks(3, sum_in_two_phases)


def without_memory(names: bool) -> tuple[bool, list[str]]:
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    host.logger.addHandler(handler)
    with pytest.MonkeyPatch.context() as patch:
        if names:
            patch.setattr(host, "host_name", lambda: f"host {dist.get_rank()}")
        else:

            def refuse(ranks: int, place: object = None) -> SharedMemory:
                raise OSError(errno.ENOMEM, "Cannot allocate memory")

            patch.setattr(host, "SharedMemory", refuse)
        communicator = Communicator()
    host.logger.removeHandler(handler)
    assert communicator.gather_objects(communicator.rank) == [0, 1]
    return host.host_group(None) is not None, said


def test_ranks_of_different_hosts_talk_through_sockets(ranks):
    assert ranks(2, without_memory, True) == [(False, []), (False, [])]


def test_where_memory_is_short_ranks_talk_through_sockets_and_one_of_them_says_so(ranks):
    first, second = ranks(2, without_memory, False)
    assert second == (False, [])
    assert not first[0] and len(first[1]) == 1 and "Cannot allocate memory" in first[1][0]


def fork_meanwhile() -> tuple[int, bool]:
    communicator = Communicator()
    child = os.fork()
    if child == 0:
        # What a worker of a data loader does: it drops what it has of the parent, and ends.
        host._GROUPS.clear()
        communicator._host = None
        os._exit(7)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    communicator.barrier()
    left = any("memfd:deepspeed" in str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink())
    return status, left


def test_a_fork_harms_neither_child_nor_parent_and_no_descriptor_of_the_memory_stays(ranks):
    assert ranks(2, fork_meanwhile) == [(7, False)] * 2


def be_the_other_rank(connection, how: str) -> None:
    memory = SharedMemory(2, connection.recv())
    connection.send(os.getpid())
    group = HostGroup(memory, 8, (5, 8), (connection.recv(), os.getpid()), timedelta(seconds=30))
    group.begin(Kind.barrier).wait()
    if how == "leaves":
        group.close()
    elif how == "differs":
        group.begin(Kind.all_gather, torch.zeros(4))
    connection.recv()


@pytest.mark.parametrize(
    ("how", "reason"), [("dies", "its process has ended"), ("leaves", "it has left"), ("differs", "all_gather of 16 bytes")]
)
def test_whoever_waits_for_a_rank_that_does_not_come_is_told_which_and_why_within_seconds(how, reason):
    context = get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed", "tests.pool"])
    here, there = context.Pipe()
    process = context.Process(target=be_the_other_rank, args=(there, how), daemon=True)
    process.start()
    memory = SharedMemory(2)
    here.send(memory.place(os.getpid()))
    group = HostGroup(memory, 5, (5, 8), (os.getpid(), here.recv()), timedelta(seconds=30))
    here.send(os.getpid())
    group.begin(Kind.barrier).wait()
    waiting = group.begin(Kind.reduce_scatter, torch.ones(1 << 20), Sum(torch.ones(1 << 19)))
    if how == "dies":
        process.kill()
    started = time.monotonic()
    for operation in (waiting, group.begin(Kind.barrier)):
        with pytest.raises(PeerError, match=reason) as error:
            operation.wait()
        assert error.value.peer == 8
    assert time.monotonic() - started < 5
    group.close()
    process.kill()
    process.join()
