"""A model of blocks, and how tests train it at stage 3."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.parity import Training, assert_parity, generator

WIDTH = 12


def inputs(index: int) -> Tensor:
    return torch.randn(3, WIDTH, generator=generator(index))


def squared_output(model: nn.Module, index: int, backward) -> None:
    backward(model(inputs(index)).square().mean())


class Block(nn.Module):
    """A layer whose weight matters to the gradients of its input, and a scale whose does too."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.inner(x)) * self.scale


class Stack(nn.Module):
    """Blocks between two layers."""

    def __init__(self, block: type[nn.Module] = Block, count: int = 3) -> None:
        super().__init__()
        self.enter = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList([block() for _ in range(count)])
        self.leave = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for block in self.blocks:
            x = block(x)
        return self.leave(x)


def assert_stage_3_parity(ranks, model, micro_step=squared_output, size: int = 2, **more) -> None:
    assert_parity(ranks, Training(model, micro_step, **more), size, stages=(3,))
