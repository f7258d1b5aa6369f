from __future__ import annotations

import pytest
import torch
from torch import Tensor

import deepspeed
from deepspeed.checkpoint.activations.random_states import CudaRNGStatesTracker, RecordedStates
from tests.checkpoint.activations.support import AllRanks, configured


def seeded(seed: int, count: int) -> list[float]:
    """What a generator of its own draws from ``seed``."""
    return torch.rand(count, generator=torch.Generator().manual_seed(seed)).tolist()


def test_a_named_state_goes_on_where_its_last_fork_ended_and_the_default_one_is_left_alone():
    tracker = CudaRNGStatesTracker()
    tracker.add("dropout", 12)
    torch.manual_seed(5)
    drawn = []
    for _ in range(2):
        torch.rand(1)
        with tracker.fork("dropout"):
            drawn += torch.rand(8).tolist()
    assert drawn == [*seeded(12, 16)]
    state = torch.get_rng_state()
    torch.manual_seed(5)
    torch.rand(1), torch.rand(1)
    assert torch.equal(state, torch.get_rng_state())


def test_a_fork_that_raises_ends_too():
    tracker = CudaRNGStatesTracker()
    tracker.add("dropout", 12)
    before = torch.get_rng_state()
    with pytest.raises(KeyError), tracker.fork("dropout"):
        torch.rand(8)
        raise KeyError
    assert torch.equal(before, torch.get_rng_state())
    with tracker.fork("dropout"):
        assert torch.rand(8).tolist() == seeded(12, 16)[8:]


def test_states_can_be_kept_and_set_again():
    tracker = CudaRNGStatesTracker()
    tracker.add("dropout", 12)
    kept = tracker.get_states()
    with tracker.fork("dropout"):
        torch.rand(8)
    tracker.set_states(kept)
    with tracker.fork("dropout"):
        assert torch.rand(8).tolist() == seeded(12, 8)
    tracker.reset()
    assert tracker.get_states() == {} and list(kept) == ["dropout"]
    tracker.add("dropout", 12)


def test_recorded_states_are_drawn_from_each_time_and_the_tracker_goes_on():
    tracker = CudaRNGStatesTracker()
    tracker.add("dropout", 12)
    recorded = RecordedStates(tracker)

    def draw() -> list[float]:
        with tracker.fork("dropout"):
            return torch.rand(8).tolist()

    first = draw()
    for _ in range(2):
        with recorded:
            assert draw() == first
    assert draw() == seeded(12, 16)[8:]


@pytest.mark.parametrize(
    ("name", "seed", "message"),
    [
        ("dropout", 13, "there is a random state 'dropout' already; call reset"),
        ("other", 12, "the random state 'other' cannot start from seed 12: another state does"),
    ],
)
def test_a_name_or_seed_that_is_taken_is_refused(name, seed, message):
    tracker = CudaRNGStatesTracker()
    tracker.add("dropout", 12)
    with pytest.raises(ValueError, match=message):
        tracker.add(name, seed)


def test_a_fork_of_an_unknown_state_names_the_known_ones():
    tracker = CudaRNGStatesTracker()
    with pytest.raises(ValueError, match=r"no random state 'model-parallel-rng' \(known: none\): add it, or call deepspeed"):
        tracker.fork().__enter__()
    tracker.add("dropout", 12)
    with pytest.raises(ValueError, match=r"no random state 'other' \(known: 'dropout'\)"):
        tracker.fork("other").__enter__()


def draw_after_seeding(mpu: bool) -> tuple[Tensor, Tensor, list[str]]:
    with configured(AllRanks() if mpu else None):
        # States of before are forgotten.
        deepspeed.checkpointing.get_cuda_rng_tracker().add("old", 1234)
        deepspeed.checkpointing.model_parallel_cuda_manual_seed(1234)
        tracker = deepspeed.checkpointing.get_cuda_rng_tracker()
        with tracker.fork():
            parallel = torch.rand(4)
        return torch.rand(4), parallel, list(tracker.get_states())


def test_model_parallel_ranks_share_the_default_state_and_differ_in_theirs(ranks):
    for rank, (default, parallel, names) in enumerate(ranks(2, draw_after_seeding, True)):
        assert default.tolist() == seeded(1234, 4)
        assert parallel.tolist() == seeded(1234 + 2718 + rank, 4)
        assert names == ["model-parallel-rng"]


def test_without_an_mpu_this_is_model_parallel_rank_0():
    default, parallel, _ = draw_after_seeding(False)
    assert (default.tolist(), parallel.tolist()) == (seeded(1234, 4), seeded(1234 + 2718, 4))


def test_the_documented_class_is_that_of_the_tracker():
    assert isinstance(deepspeed.checkpointing.get_cuda_rng_tracker(), deepspeed.checkpointing.CudaRNGStatesTracker)
