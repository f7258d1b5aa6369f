"""Ways in which modules are called and compute, each at stage 3 to the numbers of plain PyTorch."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import deepspeed
from tests.parity import generator
from tests.zero.stack import WIDTH, Block, Stack, assert_stage_3_parity, inputs

# -- which modules run -----------------------------------------------------------------------------------------------


class Experts(nn.Module):
    """Runs one of three experts: another one in each block, step and rank."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.experts[int(x.detach().abs().sum() * 1e3) % 3](x)) + x


@pytest.mark.parametrize("accumulation", [1, 2])
def test_ranks_take_different_branches_inside_a_block(ranks, accumulation):
    assert_stage_3_parity(ranks, partial(Stack, Experts), steps=5, accumulation=accumulation)


class Repeated(Stack):
    """Calls its blocks several times, in an order that goes back and forth."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for index in (0, 0, 1, 2, 1, 0):
            x = self.blocks[index](x)
        return self.leave(self.enter(x))


def test_modules_are_called_several_times_in_a_forward(ranks):
    assert_stage_3_parity(ranks, Repeated)


class Reordered(Stack):
    def forward(self, x: Tensor, order: tuple[int, ...]) -> Tensor:
        x = self.enter(x)
        for index in order:
            x = self.blocks[index](x)
        return self.leave(x)


def other_order_in_each_step(model: nn.Module, index: int, backward) -> None:
    order = [(0, 1, 2), (2, 1, 0), (1,), (0, 2, 0)][index // 2 % 4]
    backward(model(inputs(index), order).square().mean())


def test_the_order_of_blocks_changes_with_every_step(ranks):
    assert_stage_3_parity(ranks, Reordered, other_order_in_each_step, steps=5)


def inner_modules_called_directly(model: nn.Module, index: int, backward) -> None:
    """A part of a block, a block, and a layer, each without what is around it."""
    hidden = model.blocks[1].inner(inputs(index))
    backward(model.leave(model.blocks[2](hidden.tanh())).square().mean() + model(inputs(index)).mean())


def test_inner_modules_are_called_without_the_modules_around_them(ranks):
    assert_stage_3_parity(ranks, Stack, inner_modules_called_directly)


# -- whose parameters they use ---------------------------------------------------------------------------------------


class SharedWeights(nn.Module):
    """Blocks that compute with a table's weight too; the head is the embedding, transposed."""

    def __init__(self, register: bool, tied: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(17, WIDTH)
        self.blocks = nn.ModuleList([Block() for _ in range(3)])
        self.mixing = nn.Linear(WIDTH, WIDTH)
        if register:
            deepspeed.zero.register_external_parameter(self, self.embedding.weight)
            for block in self.blocks:
                deepspeed.zero.register_external_parameter(block, self.mixing.weight)
        for block in self.blocks:
            block.register_forward_pre_hook(self.mixed)

    def mixed(self, _: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (torch.tanh(functional.linear(args[0], self.mixing.weight, self.mixing.bias)),)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return x @ self.embedding.weight.t()


def next_token(model: nn.Module, index: int, backward) -> None:
    tokens = torch.randint(0, 17, (4, 5), generator=generator(index))
    backward(functional.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()))


@pytest.mark.parametrize("register", [True, False])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_modules_compute_with_parameters_of_other_modules(ranks, register, accumulation):
    assert_stage_3_parity(ranks, partial(SharedWeights, register), next_token, accumulation=accumulation)


class PassedOn(nn.Module):
    """Gives a parameter to a module as an argument, and computes with one in a function of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.blocks = nn.ModuleList([Product() for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, self.table)
        return x @ self.table


class Product(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        return torch.tanh(x @ (self.weight @ other))


def test_a_parameter_is_an_argument_of_a_module(ranks):
    assert_stage_3_parity(ranks, PassedOn)


class ProjectedByHand(torch.autograd.Function):
    """A product that asks autograd for the weight again in backward."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return gradient @ weight, gradient.flatten(0, -2).t() @ x.flatten(0, -2)


class GatheredInside(nn.Module):
    """Gathers the weight of a module that it never calls, or of one that it did, and computes with it."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.body = nn.ModuleList([Block() for _ in range(3)])
        self.embedding = nn.Embedding(17, WIDTH)
        self.head = nn.Linear(WIDTH, 17, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.body:
            x = block(x)
        with deepspeed.zero.GatheredParameters([self.head.weight]):
            return ProjectedByHand.apply(x, self.head.weight)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_module_computes_with_what_it_gathers_by_hand(ranks, tied, accumulation):
    assert_stage_3_parity(ranks, partial(GatheredInside, tied), next_token, accumulation=accumulation)


def frozen_between() -> nn.Module:
    model = Stack()
    model.blocks[1].requires_grad_(False)
    return model


def frozen_but_for_one_block() -> nn.Module:
    model = Stack().requires_grad_(False)
    model.blocks[1].requires_grad_(True)
    return model


def frozen_scales() -> nn.Module:
    model = Stack()
    for block in model.blocks:
        block.scale.requires_grad_(False)
    return model


@pytest.mark.parametrize("model", [frozen_between, frozen_but_for_one_block, frozen_scales])
def test_frozen_blocks_and_parameters_lie_between_trained_ones(ranks, model):
    assert_stage_3_parity(ranks, model)


# -- what goes in and comes out ----------------------------------------------------------------------------------------


@dataclass
class Output:
    hidden: Tensor
    extra: list[Tensor]


class Mapped(OrderedDict):
    """A mapping whose entries are attributes too, as libraries return."""

    def __getattr__(self, name: str) -> Tensor:
        return self[name]


class Plain:
    """An object of no known kind."""

    def __init__(self, hidden: Tensor):
        self.hidden = hidden


class InDataclass(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, x: Tensor) -> Output:
        y = self.block(x)
        return Output(y * self.block.scale, [y, x])


class InMapping(InDataclass):
    def forward(self, x: Tensor) -> Mapped:
        y = self.block(x)
        return Mapped(hidden=y * self.block.scale, extra=({"more": y}, x))


class InObject(InDataclass):
    def forward(self, x: Tensor) -> Plain:
        return Plain(self.block(x) * self.block.scale)


class Unpacking(Stack):
    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for block in self.blocks:
            x = block(x).hidden
        return self.leave(x)


@pytest.mark.parametrize("block", [InDataclass, InMapping, InObject])
def test_outputs_are_in_containers(ranks, block):
    assert_stage_3_parity(ranks, partial(Unpacking, block))


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, *, states: dict[str, list[Tensor]], flag: bool) -> tuple[Tensor, None]:
        (x,) = states["x"]
        return self.block(x) * self.block.scale if flag else x, None


class CallingByKeyword(Stack):
    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for block in self.blocks:
            x, _ = block(states={"x": [x]}, flag=True)
        return self.leave(x)


def test_inputs_are_in_containers(ranks):
    assert_stage_3_parity(ranks, partial(CallingByKeyword, Keywords))


class InPlace(nn.Module):
    """Changes its input in place and returns it."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, x: Tensor) -> Tensor:
        return x.add_(self.block(x * 1))


class InPlaceBeside(InPlace):
    """Changes its input in place and returns something else."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.block(x * 1)
        x.mul_(2)
        return y * self.block.scale + x


class HandingThrough(Block):
    """Returns its input beside its output."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x), x


class Skipping(Block):
    """Does nothing but return its input, for every other input."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.detach().sum() > 0 else super().forward(x)


class SkippingInTuple(Skipping):
    def forward(self, x: Tensor) -> tuple[Tensor, int]:
        return super().forward(x), 1


class OfTuples(Stack):
    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for block in self.blocks:
            x, _ = block(x)
        return self.leave(x)


class Residual(Stack):
    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x) * 1
        for block in self.blocks:
            y, before = block(x)
            x = y + before
        return self.leave(x)


@pytest.mark.parametrize("block", [InPlace, InPlaceBeside, Skipping])
def test_a_block_changes_or_returns_its_input(ranks, block):
    assert_stage_3_parity(ranks, partial(Stack, block))


def test_a_block_hands_its_input_through(ranks):
    assert_stage_3_parity(ranks, partial(Residual, HandingThrough))


def test_a_block_returns_its_input_on_some_ranks_in_a_tuple(ranks):
    assert_stage_3_parity(ranks, partial(OfTuples, SkippingInTuple), steps=5)


class OnViews(Stack):
    """Gives its blocks parts of a tensor, and puts the results into parts of another."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        result = torch.zeros_like(x)
        for row, block in enumerate(self.blocks):
            result[row] = block(x[row])
        return self.leave(result)


def test_inputs_and_outputs_are_views(ranks):
    assert_stage_3_parity(ranks, OnViews)


def inputs_with_gradients(model: nn.Module, index: int, backward) -> None:
    x = inputs(index).requires_grad_()
    backward(model(x).square().mean())
    assert x.grad is not None


def test_the_model_s_input_has_a_gradient(ranks):
    assert_stage_3_parity(ranks, Stack, inputs_with_gradients)
