from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import deepspeed
from deepspeed.engine.loader import RepeatingLoader
from tests.engine.test_engine import ds_config, make_model


def test_a_repeating_loader_starts_again():
    loader = RepeatingLoader([1, 2, 3])
    assert [next(loader) for _ in range(7)] == [1, 2, 3, 1, 2, 3, 1]


def test_each_repetition_is_shuffled_anew():
    data = list(range(64))
    loader = DataLoader(data, batch_size=64, sampler=DistributedSampler(data, num_replicas=1, rank=0))
    repeating = RepeatingLoader(loader)
    first, second = (next(repeating).tolist() for _ in range(2))
    assert sorted(first) == sorted(second) == data
    assert first != second


def test_a_loader_without_batches_is_an_error_rather_than_an_endless_loop():
    with pytest.raises(ValueError, match="has no batches"):
        next(RepeatingLoader([]))


class Squares(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = make_model()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x).square().mean()


def trained_past_the_end_of_the_data() -> tuple[int, float]:
    data = TensorDataset(torch.ones(16, 16))
    engine, _, loader, _ = deepspeed.initialize(model=Squares(), config=ds_config(1), training_data=data)
    assert len(loader) == 2
    losses = [float(engine.train_batch()) for _ in range(5)]
    assert losses[0] > float(engine.eval_batch(iter(loader)))
    return engine.global_steps, losses[0] - losses[-1]


def test_train_batch_repeats_the_engines_own_data(ranks):
    for steps, learned in ranks(2, trained_past_the_end_of_the_data):
        assert steps == 5
        assert learned > 0
