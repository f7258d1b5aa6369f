"""The engine trains to the same bits with checkpoints and without them."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deepspeed
from tests.checkpoint.activations.support import AllRanks, configured
from tests.parity import Training, assert_equal, assert_parity, generator, train_engine

WIDTH = 16


class Blocks(nn.Module):
    """Blocks with dropout; the first is used twice, in two checkpoints, of which the second lies within another."""

    def __init__(self, *, checkpointed: bool, dropout: float = 0.0) -> None:
        super().__init__()
        self.checkpointed = checkpointed
        self.enter = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(
            [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Dropout(dropout)) for _ in range(3)]
        )

    def call(self, function: Any, *args: Any) -> Any:
        return deepspeed.checkpointing.checkpoint(function, *args) if self.checkpointed else function(*args)

    def last(self, x: Tensor) -> Tensor:
        return self.call(self.blocks[0], x) + x

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x.to(self.enter.weight.dtype))
        for block in self.blocks:
            x = self.call(block, x)
        return self.call(self.last, x)


def squared_output(model: nn.Module, index: int, backward: Any) -> None:
    x = torch.randn(4, WIDTH, generator=generator(index))
    backward(model(x).float().square().mean())


def replicated(model: nn.Module, index: int, backward: Any) -> None:
    """All ranks of a step have the same data, as model-parallel ranks do."""
    squared_output(model, index // 2, backward)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_every_stage_trains_to_the_numbers_of_plain_pytorch(ranks, accumulation):
    training, plain = (
        Training(partial(Blocks, checkpointed=checkpointed), squared_output, accumulation=accumulation)
        for checkpointed in (True, False)
    )
    assert_parity(ranks, training, plain=plain)


def compare(config: dict[str, Any], settings: dict[str, Any]) -> None:
    micro_step = replicated if settings else squared_output
    for stage in (0, 1, 2, 3):
        training = partial(Training, micro_step=micro_step, accumulation=2, config=config)
        expected = train_engine(training(partial(Blocks, checkpointed=False, dropout=0.2)), stage)
        with configured(AllRanks() if settings else None, **settings):
            result = train_engine(training(partial(Blocks, checkpointed=True, dropout=0.2)), stage)
            assert deepspeed.checkpointing.is_configured() == bool(settings)
        assert_equal(result.weights, expected.weights)
        assert result.norms == expected.norms


@pytest.mark.parametrize(
    "config", [{}, {"bf16": {"enabled": True}}, {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}], ids=str
)
def test_every_stage_trains_to_the_bits_that_it_has_without_checkpoints(ranks, config):
    ranks(2, compare, config, {})


@pytest.mark.parametrize("more", [{}, {"contiguous_checkpointing": True, "num_checkpoints": 4}], ids=str)
def test_so_it_does_while_activations_are_split_over_the_ranks_that_reduce_gradients(ranks, more):
    ranks(2, compare, {}, {"partition_activations": True, **more})
