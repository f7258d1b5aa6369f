from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from deepspeed.comm.communicator import Communicator

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def values(rank: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(rank)).to(dtype)


def reduce_scattered(dtype: torch.dtype) -> torch.Tensor:
    communicator = Communicator()
    buffer = values(communicator.rank, 12 * communicator.size, dtype)
    communicator.reduce_scatter(buffer, scale=0.5).wait()
    return buffer.chunk(communicator.size)[communicator.rank].clone()


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_reduce_scatter_sums_in_rank_order_in_fp32(ranks, size, dtype):
    total = torch.zeros(12 * size)
    for rank in range(size):
        total += values(rank, 12 * size, dtype).float()
    expected = (total * 0.5).to(dtype)
    assert torch.equal(torch.cat(ranks(size, reduce_scattered, dtype)), expected)


def all_gathered(dtype: torch.dtype) -> torch.Tensor:
    communicator = Communicator()
    buffer = torch.full((5 * communicator.size,), float("nan"), dtype=dtype)
    buffer.chunk(communicator.size)[communicator.rank].copy_(values(communicator.rank, 5, dtype))
    communicator.all_gather(buffer).wait()
    return buffer


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_gather_puts_each_slice_in_its_place_on_every_rank(ranks, size, dtype):
    expected = torch.cat([values(rank, 5, dtype) for rank in range(size)])
    for result in ranks(size, all_gathered, dtype):
        assert torch.equal(result, expected)


def several_at_once() -> list[torch.Tensor]:
    communicator = Communicator()
    buffers = [values(10 * i + communicator.rank, 8 * communicator.size, torch.float32) for i in range(5)]
    pending = [communicator.reduce_scatter(buffer) for buffer in buffers]
    for operation in pending:
        operation.wait()
    pending = [communicator.all_gather(buffer) for buffer in buffers]
    for operation in reversed(pending):
        operation.wait()
    return buffers


def test_operations_in_flight_together_do_not_mix(ranks):
    for result in ranks(4, several_at_once):
        for i, buffer in enumerate(result):
            expected = sum(values(10 * i + rank, 32, torch.float32) for rank in range(4))
            torch.testing.assert_close(buffer, expected)


def small_operations() -> dict[str, object]:
    communicator = Communicator()
    mine = torch.tensor([1.0, 10.0 * communicator.rank])
    reduced = mine.clone()
    communicator.all_reduce(reduced, scale=2.0).wait()
    sent = mine.clone()
    communicator.broadcast(sent, source=communicator.size - 1).wait()
    communicator.barrier()
    return {
        "sum": communicator.sum_in_rank_order(mine),
        "reduced": reduced,
        "sent": sent,
        "objects": communicator.gather_objects(communicator.rank),
    }


@pytest.mark.parametrize("size", [1, 2, 4])
def test_small_operations_agree_on_all_ranks(ranks, size):
    for result in ranks(size, small_operations):
        total = torch.tensor([float(size), 10.0 * sum(range(size))])
        assert torch.equal(result["sum"], total)
        assert torch.equal(result["reduced"], 2 * total)
        assert torch.equal(result["sent"], torch.tensor([1.0, 10.0 * (size - 1)]))
        assert result["objects"] == list(range(size))


def volumes() -> dict[str, int]:
    communicator = Communicator()
    buffer = torch.zeros(1024 * communicator.size)
    for operation in (communicator.reduce_scatter, communicator.all_gather, communicator.all_reduce):
        operation(buffer).wait()
    return {name: communicator.log.total(name).wire_nbytes for name in ("reduce_scatter", "all_gather", "all_reduce")}


def test_the_log_counts_the_bytes_each_rank_sends(ranks):
    for result in ranks(4, volumes):
        assert result == {"reduce_scatter": 3 * 4096, "all_gather": 3 * 4096, "all_reduce": 6 * 4096}


def in_a_subgroup() -> float | None:
    group = dist.new_group([1, 3])
    if dist.get_rank() not in (1, 3):
        return None
    communicator = Communicator(group)
    buffer = torch.full((4,), float(dist.get_rank()))
    communicator.reduce_scatter(buffer).wait()
    communicator.all_gather(buffer).wait()
    return buffer.tolist()


def test_a_subgroup_communicates_by_its_own_ranks(ranks):
    assert ranks(4, in_a_subgroup) == [None, [4.0] * 4, None, [4.0] * 4]


def empty_buffers() -> None:
    communicator = Communicator()
    for operation in (communicator.reduce_scatter, communicator.all_gather, communicator.all_reduce):
        operation(torch.empty(0)).wait()


def test_empty_buffers_need_no_communication(ranks):
    ranks(2, empty_buffers)


def reduce_twice_into_another_tensor(dtype: torch.dtype) -> tuple[list[float], list[float]]:
    communicator = Communicator()
    out, found = torch.full((4,), 5.0), []
    for accumulate in (False, True):
        buffer = torch.full((4 * communicator.size,), communicator.rank + 1.0, dtype=dtype)
        communicator.reduce_scatter(buffer, out=out, scale=0.5, accumulate=accumulate).wait()
        found.append(out.tolist())
    return found[0], found[1]


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_reduce_scatter_writes_its_slice_into_another_tensor_or_adds_it(ranks, count, dtype):
    total = sum(range(1, count + 1))
    for written, added in ranks(count, reduce_twice_into_another_tensor, dtype):
        assert written == [0.5 * total] * 4
        assert added == [total] * 4
