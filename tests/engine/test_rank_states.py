"""What a resumed training goes on with beside weights and states: random numbers, and the place in the data."""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import deepspeed
from deepspeed.engine.loader import RepeatingLoader, ResumableSampler
from deepspeed.engine.rank_states import random_states, set_random_states
from tests.parity import assert_equal, state_of


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.dropout(self.inner(x), 0.5).square().mean()


def make() -> deepspeed.DeepSpeedEngine:
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(24, 8, generator=torch.Generator().manual_seed(5)))
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": 2},
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01}},
    }
    return deepspeed.initialize(model=Dropping(), config=config, training_data=data)[0]


def resumed(directory: str) -> tuple[list[float], list[float], dict[str, Tensor], dict[str, Tensor]]:
    """Six batches are an epoch: the resumed part begins in the second and ends in the third."""
    torch.manual_seed(deepspeed.comm.get_rank())
    engine = make()
    for _ in range(8):
        engine.train_batch()
    engine.save_checkpoint(directory)
    expected = [float(engine.train_batch()) for _ in range(6)], state_of(engine.module)
    other = make()
    other.load_checkpoint(directory)
    found = [float(other.train_batch()) for _ in range(6)], state_of(other.module)
    return expected[0], found[0], expected[1], found[1]


def test_a_resumed_training_draws_the_same_numbers_and_sees_the_same_data(ranks, tmp_path):
    for expected, found, expected_weights, found_weights in ranks(2, resumed, str(tmp_path)):
        assert found == expected
        assert_equal(found_weights, expected_weights)


def loaders(size: int, batch: int) -> list[RepeatingLoader]:
    data = list(range(48))
    samplers = [ResumableSampler(data, size, rank) for rank in range(size)]
    return [RepeatingLoader(DataLoader(data, batch_size=batch, sampler=sampler)) for sampler in samplers]


def taken(of: list[RepeatingLoader], batches: int) -> list[int]:
    return [sample for _ in range(batches) for loader in of for sample in next(loader).tolist()]


def test_other_ranks_and_batches_go_on_with_the_samples_that_are_left():
    four = loaders(4, 2)
    taken(four, 6)
    first = taken(four, 2)
    for size, batch in ((4, 2), (2, 4), (1, 8), (1, 2), (2, 1)):
        others = loaders(size, batch)
        for loader in others:
            loader.go_to(**four[0].position())
        rest = taken(others, 32 // (size * batch))
        assert sorted(first + rest) == list(range(48))


def test_a_loader_whose_sampler_cannot_skip_goes_to_the_same_place():
    loader = RepeatingLoader([1, 2, 3])
    for _ in range(5):
        next(loader)
    other = RepeatingLoader([1, 2, 3])
    other.go_to(**loader.position())
    assert [next(other) for _ in range(4)] == [next(loader) for _ in range(4)] == [3, 1, 2, 3]


def test_all_generators_go_on_where_they_were():
    def draws() -> list[float]:
        return [random.random(), random.gauss(0, 1), float(np.random.standard_normal()), float(torch.rand(()))]

    draws()
    states = random_states()
    expected = draws()
    draws()
    set_random_states(states)
    assert draws() == expected
