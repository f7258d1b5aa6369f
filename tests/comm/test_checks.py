"""Each test lets ranks go different ways, and looks at what every one of them is told."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from deepspeed.comm.communicator import Communicator
from deepspeed.comm.operations import CollectiveError

SOON = 20.0
"""Seconds: far below the timeout of half an hour, far above what a busy machine takes."""


def told(action: Callable[[Communicator], object]) -> str:
    """What a rank is told that runs ``action``, soon."""
    communicator = Communicator().checked()
    started = time.monotonic()
    try:
        action(communicator)
    except CollectiveError as error:
        assert time.monotonic() - started < SOON
        return str(error)
    return ""


def gather(communicator: Communicator, purpose: str, numel: int = 12) -> None:
    communicator.all_gather(torch.zeros(numel), purpose=purpose).wait()


def gather_what_the_rank_likes(second: list[str]) -> str:
    def action(communicator: Communicator) -> None:
        gather(communicator, "fetch of unit 'layers.0'")
        gather(communicator, second[communicator.rank])

    return told(action)


def test_ranks_that_come_to_different_operations_are_told_the_first_difference(ranks):
    first, second = (f"fetch of unit 'layers.{i}'" for i in (1, 2))
    expected = (
        "ranks come to different operations: rank 0 is at the fetch of unit 'layers.1' (all_gather of 12 float32); "
        "rank 1 is at the fetch of unit 'layers.2' (all_gather of 12 float32)."
    )
    for text in ranks(2, gather_what_the_rank_likes, [first, second]):
        assert text.startswith(expected)
        assert "set_z3_leaf_modules" in text


def test_ranks_that_agree_are_named_together(ranks):
    for text in ranks(4, gather_what_the_rank_likes, ["one", "one", "other", "one"]):
        assert "ranks 0, 1, 3 are at the one (all_gather of 12 float32); rank 2 is at the other" in text


def gather_another_size() -> str:
    return told(lambda communicator: gather(communicator, "norm", numel=4 + 4 * communicator.rank))


def test_sizes_are_compared_too(ranks):
    for text in ranks(2, gather_another_size):
        assert "rank 0 is at the norm (all_gather of 4 float32); rank 1 is at the norm (all_gather of 8 float32)" in text


def begin_without_waiting() -> str:
    """Rank 1 looks into the store only at its next operation."""

    def action(communicator: Communicator) -> None:
        pending = communicator.all_gather(torch.zeros(4), purpose=f"fetch {communicator.rank}")
        if communicator.rank == 1:
            time.sleep(1.0)
        pending.wait()

    return told(action)


def test_a_rank_that_comes_later_is_told_as_well(ranks):
    for text in ranks(2, begin_without_waiting):
        assert "rank 0 is at the fetch 0" in text and "rank 1 is at the fetch 1" in text


def wait_in_different_groups() -> str:
    def action(communicator: Communicator) -> None:
        fetching = communicator.duplicate()
        if communicator.rank == 1:
            communicator.sum_in_rank_order(torch.ones(2), purpose="agreement on the gradient norm")
        gather(fetching, "fetch of unit 'layers.1'")

    return told(action)


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_that_wait_for_each_other_in_different_groups_are_told_where_each_is(ranks, size):
    for text in ranks(size, wait_in_different_groups):
        assert text.startswith("ranks wait for each other in vain: rank 0 waits for rank 1")
        assert "in the fetch of unit 'layers.1' (all_gather of 12 float32) since" in text
        assert "rank 1 waits for rank 0" in text
        assert "in the agreement on the gradient norm (all_gather of " in text


def leave_early() -> str:
    def action(communicator: Communicator) -> None:
        gather(communicator, "first step")
        if communicator.rank == 1:
            communicator.unchecked()
        else:
            gather(communicator, "second step")

    return told(action)


def test_a_rank_that_has_left_is_not_waited_for(ranks):
    first, second = ranks(2, leave_early)
    assert "rank 0 waits for rank 1 in the second step" in first
    assert "rank 1 has left (its engine was destroyed, or its program has ended) after the first step" in first
    assert second == ""


def be_slow() -> tuple[str, float]:
    found = 0.0

    def action(communicator: Communicator) -> None:
        nonlocal found
        for rank in range(2):
            if communicator.rank == rank:
                time.sleep(0.8)
            found += float(communicator.sum_in_rank_order(torch.ones(1))[0])

    return told(action), found


def test_a_slow_rank_is_waited_for(ranks):
    assert ranks(2, be_slow) == [("", 4.0)] * 2


def time_out() -> str:
    group = dist.new_group(timeout=timedelta(seconds=1.5))
    communicator = Communicator(group).checked()
    gather(communicator, "first step")
    try:
        if communicator.rank == 1:
            time.sleep(3.0)
        gather(communicator, "second step")
    except CollectiveError as error:
        return str(error)
    return ""


def test_after_the_timeout_of_the_group_ranks_are_told_who_did_not_come(ranks):
    for text in ranks(2, time_out):
        assert "rank 0 has waited in the second step (all_gather of 12 float32) since" in text
        assert "longer than the process group's timeout. rank 1 came to the first step (all_gather of 12 float32) at" in text
        assert "waits for nobody: it computes, or hangs outside of the engine" in text


def in_another_order() -> list[float]:
    """Two groups, whose operations are waited for in another order on each rank, as fetches and reductions may be."""
    communicator = Communicator().checked()
    other = communicator.duplicate()
    tensors = [torch.full((2,), communicator.rank + 1.0) for _ in range(2)]
    pending = [communicator.all_reduce(tensors[0]), other.all_reduce(tensors[1])]
    for operation in pending if communicator.rank == 0 else reversed(pending):
        operation.wait()
    return [float(tensor[0]) for tensor in tensors]


def test_an_operation_that_nobody_waits_for_yet_holds_nobody_up(ranks):
    assert ranks(2, in_another_order) == [[3.0, 3.0]] * 2


def every_operation() -> dict[str, object]:
    communicator = Communicator().checked()
    mine = torch.arange(4.0) + communicator.rank
    gathered, reduced, sent = mine.clone(), mine.clone(), mine.clone()
    pending = [communicator.all_gather(gathered), communicator.reduce_scatter(reduced), communicator.broadcast(sent)]
    for operation in reversed(pending):
        operation.wait()
        operation.wait()
    communicator.barrier()
    return {
        "gathered": gathered.tolist(),
        "reduced": reduced.chunk(2)[communicator.rank].tolist(),
        "sent": sent.tolist(),
        "objects": communicator.gather_objects(communicator.rank),
    }


def test_operations_give_what_they_give_without_checks(ranks):
    first, second = ranks(2, every_operation)
    assert first["gathered"] == second["gathered"] == [0.0, 1.0, 3.0, 4.0]
    assert first["reduced"] == [1.0, 3.0] and second["reduced"] == [5.0, 7.0]
    assert first["sent"] == second["sent"] == [0.0, 1.0, 2.0, 3.0]
    assert first["objects"] == second["objects"] == [0, 1]


def keys_after(count: int) -> int:
    communicator = Communicator().checked()
    for index in range(count):
        gather(communicator, f"step {index}")
    dist.barrier()
    return dist.distributed_c10d._get_default_store().num_keys()


def test_what_was_compared_is_deleted(ranks):
    assert ranks(2, keys_after, 1) == ranks(2, keys_after, 30)


def a_second_time() -> tuple[str, str]:
    return gather_what_the_rank_likes(["one", "other"]), gather_what_the_rank_likes(["one", "one"])


def test_after_an_error_another_engine_of_the_same_ranks_starts_anew(ranks):
    for first, second in ranks(2, a_second_time):
        assert first.startswith("ranks come to different operations") and second == ""
