from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import deepspeed
from deepspeed.zero import inspection as look

STATE = "momentum_buffer"
NAMES = ("fp32_param", "grad", "optimizer_state")
EVERY_CASE = list(itertools.product([1, 2], [0, 1, 2], [False, True]))


class Model(nn.Module):
    """Parameters of odd sizes, one that no rank but the first owns, a 0-dim and a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(7, 33)
        self.second = nn.Linear(33, 7)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x))) * self.scale


def make_model() -> Model:
    torch.manual_seed(1)
    return Model()


def loss(model: nn.Module, index: int) -> Tensor:
    x = torch.randn(3, 7, generator=torch.Generator().manual_seed(index))
    return model(x.to(next(model.parameters()).dtype)).float().square().mean()


def make_engine(stage: int, sixteen_bit: bool = False, **more: object) -> deepspeed.DeepSpeedEngine:
    config = {
        "train_micro_batch_size_per_gpu": 3,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}},
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 300},
        "bf16": {"enabled": sixteen_bit},
        **more,
    }
    return deepspeed.initialize(model=make_model(), config=config)[0]


def micro_step(engine: deepspeed.DeepSpeedEngine, index: int) -> None:
    rank, size = engine.communicator.rank, engine.communicator.size
    engine.backward(loss(engine, index * size + rank))


class Plain:
    """The same training in one process: fp32 masters, and a model in fp32 or bf16 that follows them."""

    def __init__(self, ranks: int, sixteen_bit: bool):
        self.ranks = ranks
        self.model = make_model()
        self.masters = {n: p.detach().clone() for n, p in self.model.named_parameters() if p.requires_grad}
        if sixteen_bit:
            self.model.bfloat16()
        self.optimizer = torch.optim.SGD(self.masters.values(), lr=0.1, momentum=0.9)

    def backward(self, index: int) -> None:
        for master in self.masters.values():
            master.grad = torch.zeros_like(master)
        for rank in range(self.ranks):
            loss(self.model, index * self.ranks + rank).backward()
            for name, master in self.masters.items():
                parameter = self.model.get_parameter(name)
                master.grad += parameter.grad.float() / self.ranks
                parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        self.optimizer.step()
        self.follow()

    @torch.no_grad()
    def follow(self) -> None:
        for name, master in self.masters.items():
            self.model.get_parameter(name).copy_(master)

    def values(self) -> dict[str, tuple[Tensor, ...]]:
        state = self.optimizer.state
        return {n: (m.detach(), m.grad, state[m][STATE]) for n, m in self.masters.items()}


def read(parameter: nn.Parameter, kind: str) -> tuple[Tensor, ...]:
    extra = {"fp32_param": (), "grad": (), "optimizer_state": (STATE,)}
    return tuple(getattr(look, f"safe_get_{kind}_{name}")(parameter, *extra[name]) for name in NAMES)


def write(parameter: nn.Parameter, kind: str, values: tuple[Tensor, ...]) -> None:
    extra = {"fp32_param": (), "grad": (), "optimizer_state": (STATE,)}
    for name, value in zip(NAMES, values, strict=True):
        getattr(look, f"safe_set_{kind}_{name}")(parameter, value, *extra[name])


def assert_values_close(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...], sixteen_bit: bool) -> None:
    for mine, theirs in zip(actual, expected, strict=True):
        assert mine.dtype == torch.float32
        limits = {"rtol": 2e-2, "atol": 5e-3} if sixteen_bit else {"rtol": 1e-5, "atol": 1e-6}
        torch.testing.assert_close(mine, theirs, **limits)


def values_read(stage: int, sixteen_bit: bool) -> dict[str, tuple[Tensor, ...]]:
    engine = make_engine(stage, sixteen_bit)
    for index in range(2):
        micro_step(engine, index)
        engine.step()
    micro_step(engine, 2)
    named = {n: p for n, p in engine.module.named_parameters() if p.requires_grad}
    full = {name: read(parameter, "full") for name, parameter in named.items()}
    local = {name: read(parameter, "local") for name, parameter in named.items()}
    if stage > 0:
        everyone = engine.communicator.gather_objects(local)
        local = {n: tuple(torch.cat(parts) for parts in zip(*(rank[n] for rank in everyone), strict=True)) for n in named}
    for name, values in full.items():
        assert all(torch.equal(a.view(-1), b) for a, b in zip(values, local[name], strict=True))
    return full


@pytest.mark.parametrize(("size", "stage", "sixteen_bit"), EVERY_CASE)
def test_values_gradients_and_states_are_those_of_plain_torch_and_the_parts_make_the_whole(ranks, size, stage, sixteen_bit):
    plain = Plain(size, sixteen_bit)
    for index in range(2):
        plain.backward(index)
        plain.step()
    plain.backward(2)
    for result in ranks(size, values_read, stage, sixteen_bit):
        for name, expected in plain.values().items():
            assert_values_close(result[name], expected, sixteen_bit)


def new_values(values: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(value / 2 + number / 64 for number, value in enumerate(values, start=1))


def values_written(stage: int, sixteen_bit: bool, kind: str) -> tuple[dict[str, tuple[Tensor, ...]], dict[str, Tensor]]:
    engine = make_engine(stage, sixteen_bit)
    micro_step(engine, 0)
    engine.step()
    micro_step(engine, 1)
    trained = {n: p for n, p in engine.module.named_parameters() if p.requires_grad}
    for parameter in trained.values():
        write(parameter, kind, new_values(read(parameter, kind)))
    engine.step()
    micro_step(engine, 2)
    weights = {n: p.detach().clone() for n, p in trained.items()}
    return {name: read(parameter, "full") for name, parameter in trained.items()}, weights


@pytest.mark.parametrize(("size", "stage", "sixteen_bit"), EVERY_CASE)
@pytest.mark.parametrize("kind", ["full", "local"])
def test_training_goes_on_from_what_was_written(ranks, size, stage, sixteen_bit, kind):
    plain = Plain(size, sixteen_bit)
    plain.backward(0)
    plain.step()
    plain.backward(1)
    for master, gradient, state in plain.values().values():
        for tensor, value in zip((master, gradient, state), new_values((master, gradient, state)), strict=True):
            tensor.copy_(value)
    plain.step()
    plain.backward(2)
    for values, weights in ranks(size, values_written, stage, sixteen_bit, kind):
        for name, expected in plain.values().items():
            assert_values_close(values[name], expected, sixteen_bit)
            assert torch.equal(weights[name], values[name][0].to(weights[name].dtype))


def halved_gradients(stage: int) -> tuple[dict[str, Tensor], int]:
    engine = make_engine(stage)
    micro_step(engine, 0)
    engine.communicator.log.clear()
    look.safe_update_full_grad_vectorized(engine.module.parameters(), lambda gradient, parameter: gradient / 2 + parameter)
    count = engine.communicator.log.total("all_reduce").count
    engine.step()
    return {n: p.detach().clone() for n, p in engine.module.named_parameters() if p.requires_grad}, count


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_all_gradients_are_updated_with_one_communication(ranks, stage):
    plain = Plain(2, False)
    plain.backward(0)
    for master in plain.masters.values():
        master.grad = master.grad / 2 + master
    plain.step()
    for weights, count in ranks(2, halved_gradients, stage):
        assert count == (1 if stage else 0)
        for name, master in plain.masters.items():
            torch.testing.assert_close(weights[name], master, rtol=1e-5, atol=1e-6)


def scaled_gradient() -> Tensor:
    engine = make_engine(2, fp16={"enabled": True, "loss_scale": 1024})
    micro_step(engine, 0)
    return look.safe_get_full_grad(engine.module.second.weight)


def test_the_gradient_has_the_loss_scale_taken_out(ranks):
    plain = Plain(2, False)
    plain.backward(0)
    for gradient in ranks(2, scaled_gradient):
        torch.testing.assert_close(gradient, plain.masters["second.weight"].grad, rtol=2e-2, atol=2e-3)


def adam_states() -> tuple[tuple[int, ...], float, tuple[int, ...]]:
    engine = make_engine(2, optimizer={"type": "AdamW", "params": {"lr": 0.1}})
    micro_step(engine, 0)
    engine.step()
    weight = engine.module.first.weight
    moments = look.safe_get_full_optimizer_state(weight, "exp_avg"), look.safe_get_local_optimizer_state(weight, "exp_avg")
    return tuple(moments[0].shape), float(look.safe_get_full_optimizer_state(weight, "step")), tuple(moments[1].shape)


def test_states_have_the_parameters_shape_and_parts_have_one_dimension(ranks):
    parts = []
    for shape, step, part in ranks(2, adam_states):
        assert shape == (33, 7) and step == 1.0 and len(part) == 1
        parts.append(part[0])
    assert sum(parts) == 33 * 7


def none_everywhere(parameter: nn.Parameter) -> bool:
    return all(value is None for kind in ("full", "local") for value in read(parameter, kind))


def nothing_to_show() -> tuple[bool, bool, bool, bool]:
    engine = make_engine(2, gradient_accumulation_steps=2)
    weight = engine.module.first.weight
    frozen = none_everywhere(engine.module.frozen)
    early = look.safe_get_full_grad(weight) is None and look.safe_get_local_grad(weight) is None
    foreign = none_everywhere(nn.Parameter(torch.ones(2)))
    engine.destroy()
    return frozen, early, foreign, none_everywhere(weight)


def test_parameters_that_no_engine_trains_show_nothing(ranks):
    assert ranks(1, nothing_to_show) == [(True, True, True, True)]


def refused(call: Callable[[], object]) -> str:
    with pytest.raises((KeyError, ValueError, RuntimeError)) as caught:
        call()
    return str(caught.value)


def mistakes() -> list[str]:
    engine = make_engine(1)
    weight = engine.module.first.weight
    said = [
        refused(lambda: look.safe_get_full_optimizer_state(weight, STATE)),
        refused(lambda: look.safe_set_full_grad(weight, torch.ones(33, 7))),
        refused(lambda: look.safe_set_full_fp32_param(engine.module.frozen, torch.ones(3))),
        refused(lambda: look.safe_set_full_fp32_param(weight, torch.ones(7, 33))),
    ]
    micro_step(engine, 0)
    engine.step()
    return [*said, refused(lambda: look.safe_get_full_optimizer_state(weight, "exp_avg"))]


def test_a_mistake_is_answered_by_name(ranks):
    for early, gradient, frozen, shape, key in ranks(2, mistakes):
        assert "first.weight: the optimizer SGD has no state 'momentum_buffer'; it has none before its first step" in early
        assert "first.weight: there is no gradient to set" in gradient
        assert "the parameter of shape (3,) is trained by no engine: it is frozen" in frozen
        assert "first.weight: the value has shape (7, 33), expected (33, 7)" in shape
        assert "has no state 'exp_avg'; it has momentum_buffer" in key


def parameters_that_keep_nothing_alive() -> bool:
    engine = make_engine(2)
    weight = engine.module.first.weight
    attributes = set(vars(weight))
    engine.destroy()
    del engine
    return attributes == set() and look.safe_get_full_fp32_param(weight) is None


def test_nothing_is_attached_to_parameters(ranks):
    assert ranks(1, parameters_that_keep_nothing_alive) == [True]
