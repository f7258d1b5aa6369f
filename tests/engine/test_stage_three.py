"""What scripts do around training, with parameters that are sharded."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import deepspeed
from deepspeed.zero.units import UnitState
from tests.engine.test_gradients import INDUCTOR
from tests.parity import (
    LR,
    MOMENTUM,
    Result,
    Training,
    assert_close,
    assert_equal,
    assert_parity,
    make_engine,
    seeded_model,
    sgd,
    state_of,
    train_plain,
)
from tests.zero.stack import Block, Stack, inputs, squared_output

CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 10},
}


def all_released(engine: deepspeed.DeepSpeedEngine) -> bool:
    return all(unit.state is UnitState.SHARDED for unit in engine.sharded_model.scopes.fetcher.units)


# -- several engines, and forwards between steps --------------------------------------------------------------------


def generate(model: Callable[[Tensor], Tensor], x: Tensor, steps: int) -> Tensor:
    with torch.no_grad():
        for _ in range(steps):
            x = torch.tanh(model(x))
    return x


def policy_loss(actor: Callable[[Tensor], Tensor], reference: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A loss on what the actor generated, with the distance to the reference's outputs."""
    with torch.no_grad():
        target = reference(x)
    output = actor(x)
    return output.square().mean() + (output - target).square().mean()


def reference_model() -> nn.Module:
    torch.manual_seed(7)
    return Stack()


def with_actor_and_reference(uneven: bool) -> dict[str, Tensor]:
    """Every rank generates for a number of its own; those that are done go on with the others, in vain."""
    actor = make_engine(Training(Stack, squared_output), 3)
    reference = deepspeed.initialize(model=reference_model(), config=CONFIG)[0]
    rank = actor.communicator.rank
    for step in range(3):
        wanted = 2 + rank if uneven else 3
        x = generate(actor.module, inputs(2 * step + rank), wanted)
        generate(actor.module, x, 4 - wanted)
        actor.backward(policy_loss(actor, reference, x))
        actor.step()
    return state_of(actor.module)


@pytest.mark.parametrize("uneven", [True, False])
def test_a_policy_generates_between_its_steps_and_is_compared_with_a_reference(ranks, uneven):
    actor = seeded_model(Training(Stack, squared_output))
    reference, optimizer = reference_model(), sgd(actor.parameters())
    for step in range(3):
        for rank in range(2):
            x = generate(actor, inputs(2 * step + rank), 2 + rank if uneven else 3)
            (policy_loss(actor, reference, x) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    for weights in ranks(2, with_actor_and_reference, uneven):
        assert_close(weights, state_of(actor))


def evaluated_between(model: nn.Module, index: int, backward) -> None:
    model.eval()
    with torch.no_grad():
        before = model(inputs(index))
    with torch.inference_mode():
        assert torch.equal(model(inputs(index)), before)
    model.train()
    squared_output(model, index, backward)


def through_the_module(model: nn.Module, index: int, backward) -> None:
    squared_output(getattr(model, "module", model), index, backward)


@pytest.mark.parametrize("micro_step", [evaluated_between, through_the_module])
def test_forwards_without_gradients_and_forwards_of_the_module_itself(ranks, micro_step):
    assert_parity(ranks, Training(Stack, micro_step, accumulation=2), stages=(3,))


# -- frozen backbones, adapters -----------------------------------------------------------------------------------------


class Adapter(nn.Module):
    """A frozen layer with a low-rank addition."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(12, 3, bias=False)
        self.up = nn.Linear(3, 12, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def adapted(model: nn.Module) -> nn.Module:
    model.requires_grad_(False)
    torch.manual_seed(4)
    for block in model.blocks:
        block.inner = Adapter(block.inner)
    return model


def trained_with_adapters(sharded_first: bool) -> dict[str, Tensor]:
    torch.manual_seed(3)
    with deepspeed.zero.Init(config_dict_or_path=CONFIG, enabled=sharded_first):
        model = Stack()
    adapted(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    engine = deepspeed.initialize(model=model, optimizer=sgd(trained), config=CONFIG)[0]
    for step in range(3):
        squared_output(engine, 2 * step + engine.communicator.rank, engine.backward)
        engine.step()
    return state_of(engine.module)


@pytest.mark.parametrize("sharded_first", [True, False])
def test_adapters_on_a_frozen_backbone(ranks, sharded_first):
    expected = train_plain(Training(lambda: adapted(Stack()), squared_output), 2)
    for weights in ranks(2, trained_with_adapters, sharded_first):
        assert_close(weights, expected.weights)


def freezing_one_block(model: nn.Module, index: int, backward) -> None:
    """From the second step on the middle block is frozen, in the fourth it is trained again."""
    model.blocks[1].requires_grad_(index // 2 in (0, 3))
    squared_output(model, index, backward)


def test_trained_parameters_are_frozen_and_trained_again(ranks):
    assert_parity(ranks, Training(Stack, freezing_one_block, steps=5), stages=(2, 3))


# -- compiled models ----------------------------------------------------------------------------------------------------


class CompiledBlocks(Stack):
    def __init__(self, backend: str) -> None:
        super().__init__()
        for block in self.blocks:
            block.compile(backend=backend)


@torch._dynamo.config.patch(recompile_limit=4, fail_on_recompile_limit_hit=True)
def train_compiled(training: Training, backend: str, whole: bool) -> dict[str, Tensor]:
    """Weights after training; raises where hooks are compiled, since each of them then is once for each kind of argument."""
    torch.compiler.reset()
    engine = make_engine(training, 3)
    if whole:
        engine.compile(backend=backend)
    rank, size = engine.communicator.rank, engine.communicator.size
    for step in range(training.steps):
        if step == 1:
            with torch.no_grad():
                engine(inputs(50))
        training.micro_step(engine, step * size + rank, engine.backward)
        engine.step()
    weights = state_of(engine.module)
    torch.compiler.reset()
    return weights


@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=INDUCTOR)])
@pytest.mark.parametrize("whole", [True, False], ids=["engine", "blocks"])
def test_compiled_models_and_blocks(ranks, backend, whole):
    plain = Training(Stack, squared_output, steps=4)
    training = plain if whole else Training(partial(CompiledBlocks, backend), squared_output, steps=4)
    expected = train_plain(plain, 2)
    for weights in ranks(2, train_compiled, training, backend, whole):
        assert_close(weights, expected.weights, 1e-5)


# -- errors, and going on after them --------------------------------------------------------------------------------------


class Failing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise ArithmeticError("the user's, in backward")


class Fragile(Block):
    """Fails in forward or in backward when it is told to."""

    fails = ""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if self.fails == "forward":
            raise ArithmeticError("the user's, in forward")
        return Failing.apply(y) * self.scale if self.fails == "backward" else y * self.scale


def going_on_after(where: str, compiled: bool) -> tuple[Result, bool]:
    engine = make_engine(Training(partial(Stack, Fragile), squared_output), 3)
    if compiled:
        engine.compile(backend="eager")
    for step in range(3):
        engine.module.blocks[1].fails = where
        with pytest.raises(ArithmeticError, match="the user's"):
            squared_output(engine, 100, engine.backward)
        engine.module.blocks[1].fails = ""
        released = all_released(engine)
        engine.zero_grad()
        squared_output(engine, 2 * step + engine.communicator.rank, engine.backward)
        engine.step()
    torch.compiler.reset()
    return Result(state_of(engine.module), []), released


@pytest.mark.parametrize(("where", "compiled"), [("forward", False), ("forward", True), ("backward", False)])
def test_training_goes_on_after_an_exception(ranks, where, compiled):
    expected = train_plain(Training(partial(Stack, Fragile), squared_output), 2)
    for result, released in ranks(2, going_on_after, where, compiled):
        assert_close(result.weights, expected.weights)
        assert released or where == "forward"


def failing_alone(where: str) -> None:
    engine = make_engine(Training(partial(Stack, Fragile), squared_output), 3)
    squared_output(engine, 0, engine.backward)
    engine.step()
    if engine.communicator.rank == 1:
        engine.module.blocks[1].fails = where
    squared_output(engine, 1, engine.backward)


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_rank_that_fails_alone_raises_its_own_error(ranks, where):
    with pytest.raises(AssertionError, match=f"the user's, in {where}"):
        ranks(2, failing_alone, where)


LEFT: list[Tensor] = []


class Leaking(Block):
    """Leaves a tensor where nobody looks for it."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        LEFT[:] = [(functional_of(self.inner, x) * self.scale).square().mean()]
        return y


def functional_of(layer: nn.Linear, x: Tensor) -> Tensor:
    return torch.tanh(nn.functional.linear(x, layer.weight, layer.bias))


def missed(gathered: bool) -> str:
    engine = make_engine(Training(partial(Stack, Leaking), squared_output), 3)
    for _ in range(2):
        engine(inputs(0))
        (loss,) = LEFT
        if gathered:
            with deepspeed.zero.GatheredParameters(engine.module.parameters()):
                engine.backward(loss)
        else:
            with pytest.raises(RuntimeError) as caught:
                engine.backward(loss)
            assert all_released(engine)
            return str(caught.value)
        engine.step()
    return ""


def test_a_loss_that_left_a_module_unseen_is_an_error_that_says_what_to_do(ranks):
    for message in ranks(2, missed, False):
        assert "'blocks.2.scale' (12,)" in message
        assert "GatheredParameters" in message
    assert ranks(2, missed, True) == ["", ""]


def penalized(model: nn.Module, index: int, backward) -> None:
    """The loss is a gradient's norm: it is differentiated twice."""
    x = inputs(index).requires_grad_()
    inner = getattr(model, "module", model)
    with deepspeed.zero.GatheredParameters(inner.parameters()):
        (gradient,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        backward(gradient.square().mean())


def test_gradients_are_differentiated_where_parameters_are_gathered(ranks):
    assert_parity(ranks, Training(Stack, penalized), stages=(2, 3))


def copied() -> tuple[bool, bool, dict[str, Tensor], dict[str, Tensor]]:
    """Rank 0 alone runs and trains a copy of the whole model."""
    engine = make_engine(Training(Stack, squared_output), 3)
    with deepspeed.zero.GatheredParameters(engine.module.parameters()):
        twin = copy.deepcopy(engine.module)
    with torch.no_grad():
        output = engine(inputs(0))
    same = True
    if engine.communicator.rank == 0:
        same = torch.equal(twin(inputs(0)), output)
        squared_output(twin, 0, lambda loss: loss.backward())
    twin.load_state_dict(seeded_model(Training(Stack, squared_output)).state_dict())
    return same, all(p.numel() for p in twin.parameters()), state_of(twin), state_of(engine.module)


def test_a_copy_made_of_gathered_parameters_is_a_model_of_its_own(ranks):
    for same, whole, twin, module in ranks(2, copied):
        assert same and whole
        assert_equal(twin, module)


# -- state dicts ------------------------------------------------------------------------------------------------------------


def loaded_wrong(through_engine: bool) -> tuple[str, bool, bool]:
    engine = make_engine(Training(Stack, squared_output), 3)
    before = state_of(engine.module)
    wrong = {name: value + 1 for name, value in before.items()}
    wrong["blocks.1.inner.weight"] = torch.zeros(12, 7)
    wrong["leave.bias"] = torch.zeros(3)
    target = engine if through_engine else engine.module
    with pytest.raises(RuntimeError) as caught:
        target.load_state_dict(wrong)
    with pytest.raises(RuntimeError, match="assign=True"):
        target.load_state_dict(before, assign=True)
    after = state_of(engine.module)
    return str(caught.value), all(torch.equal(after[name], before[name]) for name in before), all_released(engine)


@pytest.mark.parametrize("through_engine", [True, False])
def test_a_state_dict_of_other_shapes_is_refused_and_changes_nothing(ranks, through_engine):
    for message, unchanged, released in ranks(2, loaded_wrong, through_engine):
        assert "blocks.1.inner.weight" in message and "[12, 7]" in message and "[12, 12]" in message
        assert "leave.bias" in message
        assert unchanged and released


def loaded_right(config: dict[str, object], through_engine: bool, part: bool) -> dict[str, Tensor]:
    """Trained on from weights that were loaded, whole or of one block."""
    engine = make_engine(Training(Stack, squared_output, config=config), 3)
    torch.manual_seed(9)
    state = Stack().state_dict()
    if part:
        engine.module.blocks[1].load_state_dict({k[9:]: v for k, v in state.items() if k.startswith("blocks.1.")})
    else:
        (engine if through_engine else engine.module).load_state_dict(state)
    for step in range(2):
        x = inputs(2 * step + engine.communicator.rank).to(next(engine.module.parameters()).dtype)
        engine.backward(engine(x).float().square().mean())
        engine.step()
    return state_of(engine.module)


@pytest.mark.parametrize("through_engine", [True, False])
@pytest.mark.parametrize("part", [True, False])
def test_training_goes_on_from_weights_that_were_loaded(ranks, through_engine, part):
    model = seeded_model(Training(Stack, squared_output))
    torch.manual_seed(9)
    other = Stack().state_dict()
    model.load_state_dict({k: v for k, v in other.items() if not part or k.startswith("blocks.1.")}, strict=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM, weight_decay=0.01)
    for step in range(2):
        for rank in range(2):
            (model(inputs(2 * step + rank)).square().mean() / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    for weights in ranks(2, loaded_right, {}, through_engine, part):
        assert_close(weights, state_of(model))
