"""Ways in which modules are called and compute, each at stage 3 to the numbers of plain PyTorch."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import deepspeed
from tests.parity import Training, assert_parity, generator, make_engine

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


# -- losses beside the output ----------------------------------------------------------------------------------------


class Auxiliary(Block):
    """Keeps a loss of its own."""

    auxiliary: Tensor

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        self.auxiliary = (self.inner(x) * self.scale).square().mean()
        return y


class AuxiliaryAfter(Block):
    """A loss that is computed of the output, and after it."""

    auxiliary: Tensor

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        self.auxiliary = (functional.linear(y * self.scale, self.inner.weight) * self.scale).square().mean()
        return y


class AuxiliaryInside(nn.Module):
    """A loss of an inner module, in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.router = Block(), AuxiliaryAfter()
        self.losses: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        y = self.router(self.first(x))
        self.losses = [self.router.auxiliary * self.first.scale.mean()]
        return y

    @property
    def auxiliary(self) -> Tensor:
        return self.losses[0]


def with_auxiliary_losses(model: nn.Module, index: int, backward) -> None:
    loss = model(inputs(index)).square().mean()
    backward(loss + sum(block.auxiliary for block in model.blocks))


def with_auxiliary_losses_alone(model: nn.Module, index: int, backward) -> None:
    model(inputs(index))
    backward(sum(block.auxiliary for block in model.blocks))


@pytest.mark.parametrize("block", [Auxiliary, AuxiliaryAfter, AuxiliaryInside])
@pytest.mark.parametrize("micro_step", [with_auxiliary_losses, with_auxiliary_losses_alone])
def test_modules_keep_losses_of_their_own(ranks, block, micro_step):
    assert_stage_3_parity(ranks, partial(Stack, block), micro_step)


# -- how autograd goes about it ----------------------------------------------------------------------------------------


def several_forwards(model: nn.Module, index: int, backward) -> None:
    outputs = [model(inputs(3 * index + i)) for i in range(3)]
    backward((outputs[0] * outputs[1]).mean() + outputs[2].square().mean())


def one_graph_twice(model: nn.Module, index: int, backward) -> None:
    output = model(inputs(index))
    backward(output.square().mean(), retain_graph=True)
    backward(output.abs().mean())


def an_older_graph_first(model: nn.Module, index: int, backward) -> None:
    losses = [model(inputs(2 * index + i)).square().mean() for i in range(2)]
    backward(losses[0])
    backward(losses[1])


def a_forward_of_no_consequence(model: nn.Module, index: int, backward) -> None:
    model(inputs(100 + index))
    with torch.no_grad():
        model(inputs(200 + index))
    squared_output(model, index, backward)


@pytest.mark.parametrize("micro_step", [several_forwards, one_graph_twice, an_older_graph_first, a_forward_of_no_consequence])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_forwards_and_backwards_in_many_orders(ranks, micro_step, accumulation):
    assert_stage_3_parity(ranks, Stack, micro_step, accumulation=accumulation)


class Checkpointed(Stack):
    """Recomputes its blocks, ``together`` in each checkpoint."""

    def __init__(self, use_reentrant: bool, together: int) -> None:
        super().__init__(count=4)
        self.use_reentrant = use_reentrant
        self.together = together

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for first in range(0, 4, self.together):
            chosen = nn.Sequential(*self.blocks[first : first + self.together])
            x = checkpoint(chosen, x, use_reentrant=self.use_reentrant)
        return self.leave(x)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("together", [1, 2, 4])
def test_blocks_are_recomputed(ranks, use_reentrant, together):
    plain = Training(partial(Stack, count=4), squared_output)
    training = Training(partial(Checkpointed, use_reentrant, together), squared_output)
    assert_parity(ranks, training, plain=plain, stages=(3,))


class InnerCheckpoint(Block):
    """Recomputes a part of itself."""

    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        y = checkpoint(lambda x: torch.tanh(self.inner(x) * self.scale), x, use_reentrant=self.use_reentrant)
        return y * self.scale


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_part_of_a_block_is_recomputed(ranks, use_reentrant):
    assert_stage_3_parity(ranks, partial(Stack, partial(InnerCheckpoint, use_reentrant)))


class Doubling(torch.autograd.Function):
    """A function that saves a parameter, and differentiates in its own backward."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx, gradient):
        with torch.enable_grad():
            x, weight = (t.detach().requires_grad_() for t in ctx.saved_tensors)
            return torch.autograd.grad(x * weight, (x, weight), gradient)


class WithFunction(Block):
    def forward(self, x: Tensor) -> Tensor:
        return Doubling.apply(super().forward(x), self.scale)


def test_a_function_differentiates_in_its_backward(ranks):
    assert_stage_3_parity(ranks, partial(Stack, WithFunction))


class Tiled(torch.autograd.Function):
    """Runs a module on the rows of its input one by one, forward, and again in backward."""

    @staticmethod
    def forward(ctx, module, x):
        ctx.module = module
        ctx.save_for_backward(x)
        return torch.cat([module(row) for row in x.split(1)])

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        rows = [row.detach().requires_grad_() for row in x.split(1)]
        for row, part in zip(rows, gradient.split(1), strict=True):
            with torch.enable_grad():
                torch.autograd.backward(ctx.module(row), part)
        return None, torch.cat([row.grad for row in rows])


class OfTiles(Stack):
    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for block in self.blocks:
            x = Tiled.apply(block, x)
        return self.leave(x)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_block_is_differentiated_tile_by_tile(ranks, accumulation):
    training = Training(OfTiles, squared_output, accumulation=accumulation)
    plain = Training(Stack, squared_output, accumulation=accumulation)
    assert_parity(ranks, training, plain=plain, stages=(3,))


class OutsideInCheckpoint(Stack):
    """A function of the model, recomputed, uses weights of its modules."""

    def __init__(self, use_reentrant: bool | None) -> None:
        super().__init__()
        self.use_reentrant = use_reentrant

    def mixed(self, x: Tensor) -> Tensor:
        return torch.tanh(functional.linear(x, self.enter.weight) * self.blocks[0].scale)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        if self.use_reentrant is None:
            return self.leave(self.blocks[1](self.mixed(x)))
        return self.leave(self.blocks[1](checkpoint(self.mixed, x, use_reentrant=self.use_reentrant)))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_recomputed_function_uses_parameters_outside_their_modules(ranks, use_reentrant):
    plain = Training(partial(OutsideInCheckpoint, None), squared_output)
    training = Training(partial(OutsideInCheckpoint, use_reentrant), squared_output)
    assert_parity(ranks, training, plain=plain, stages=(3,))


class EncoderDecoder(nn.Module):
    """Every decoder block sees the encoder's output, whose gradient is there when all of them are done."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleList([Block() for _ in range(2)])
        self.decoder = nn.ModuleList([Attending() for _ in range(4)])

    def forward(self, x: Tensor) -> Tensor:
        y = memory = self.encoder[1](self.encoder[0](x))
        for block in self.decoder:
            y = block(y, memory)
        return y


class Attending(Block):
    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        return super().forward(x) + torch.softmax(x @ memory.t(), -1) @ memory


def test_blocks_share_an_input(ranks):
    assert_stage_3_parity(ranks, EncoderDecoder)


def most_live(model) -> int:
    config = {"zero_optimization": {"stage3_prefetch_bucket_size": 0, "reduce_bucket_size": 0}}
    engine = make_engine(Training(model, squared_output, config=config), 3)
    for step in range(2):
        squared_output(engine, step, engine.backward)
        engine.step()
    fetcher = engine.sharded_model.scopes.fetcher
    return round(fetcher.most_live_numel / max(unit.numel for unit in fetcher.units))


@pytest.mark.parametrize("model", [Stack, EncoderDecoder, partial(Checkpointed, False, 1), partial(Checkpointed, True, 1)])
def test_one_block_is_whole_at_a_time(ranks, model):
    # Backward comes to a block before it has left the next: two for a moment.
    assert max(ranks(2, most_live, model)) <= 2
