"""Ways in which losses and autograd go about modules, each at stage 3 to the numbers of plain PyTorch."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from tests.parity import Training, assert_parity, make_engine
from tests.zero.stack import Block, Stack, assert_stage_3_parity, inputs, squared_output

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
