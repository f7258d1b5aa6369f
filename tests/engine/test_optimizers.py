"""Optimizers, parameter groups and schedules, by configuration and by the client, as plain PyTorch runs them."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from deepspeed.optim import Lamb, Lion, Muon, build_scheduler, split_parameter_groups
from tests.parity import (
    Training,
    assert_parity,
    default_optimizer,
    generator,
    make_engine,
    sgd,
)

WIDTH = 12


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 21), nn.Tanh(), nn.Linear(21, WIDTH), nn.LayerNorm(WIDTH))


def squared_output(model: nn.Module, index: int, backward) -> None:
    backward(model(torch.randn(3, WIDTH, generator=generator(index))).square().mean())


def of_parameters(kind: Any, options: dict[str, object], model: nn.Module) -> torch.optim.Optimizer:
    return kind(model.parameters(), **options)


def muon(model: nn.Module) -> torch.optim.Optimizer:
    return Muon(split_parameter_groups("Muon", [{"params": list(model.parameters())}]), lr=0.02)


@pytest.mark.parametrize(
    ("name", "params", "plain"),
    [
        ("Adam", {"lr": 0.01, "weight_decay": 0.1}, partial(of_parameters, torch.optim.AdamW)),
        ("adam", {"lr": 0.01, "weight_decay": 0.1, "adam_w_mode": False}, partial(of_parameters, torch.optim.Adam)),
        ("AdamW", {"lr": 0.01, "weight_decay": 0.1, "betas": [0.8, 0.95]}, partial(of_parameters, torch.optim.AdamW)),
        ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True}, partial(of_parameters, torch.optim.SGD)),
        ("Adagrad", {"lr": 0.01, "lr_decay": 0.1}, partial(of_parameters, torch.optim.Adagrad)),
        ("Lion", {"lr": 0.001, "weight_decay": 0.1}, partial(of_parameters, Lion)),
        ("Lamb", {"lr": 0.01, "weight_decay": 0.1}, partial(of_parameters, Lamb)),
        ("Muon", {"lr": 0.02}, muon),
    ],
)
def test_each_optimizer_of_the_configuration(ranks, name, params, plain):
    if isinstance(plain, partial):
        options = {key: tuple(value) if isinstance(value, list) else value for key, value in params.items()}
        options.pop("adam_w_mode", None)
        plain = partial(plain, options)
    config = {"optimizer": {"type": name, "params": params}, "gradient_clipping": 0.5}
    training = Training(perceptron, squared_output, accumulation=2, config=config, optimizer=plain)
    assert_parity(ranks, training, tolerance=1e-5)


def unequal_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Weights decay, biases do not; the last layer has a rate of its own, and the second bias is in no group."""
    named = dict(model.named_parameters())
    return [
        {"params": [named["0.weight"], named["2.weight"]], "weight_decay": 0.3},
        {"params": [named["0.bias"]], "weight_decay": 0.0},
        {"params": [named["3.weight"], named["3.bias"]], "lr": 0.01, "momentum": 0.5},
    ]


def groups_as_model_parameters(model: nn.Module) -> dict[str, Any]:
    return {"model_parameters": unequal_groups(model)}


def groups_in_a_client_optimizer(model: nn.Module) -> dict[str, Any]:
    return {"optimizer": sgd(unequal_groups(model))}


def groups_for_a_callable(model: nn.Module) -> dict[str, Any]:
    return {"optimizer": sgd, "model_parameters": unequal_groups(model)}


def sgd_on_groups(model: nn.Module) -> torch.optim.Optimizer:
    return sgd(unequal_groups(model))


@pytest.mark.parametrize("arguments", [groups_as_model_parameters, groups_in_a_client_optimizer, groups_for_a_callable])
def test_parameter_groups_keep_their_own_options(ranks, arguments):
    assert_parity(ranks, Training(perceptron, squared_output, arguments=arguments, optimizer=sgd_on_groups))


def named_parameters(model: nn.Module) -> dict[str, Any]:
    return {"model_parameters": model.named_parameters()}


def a_callable(model: nn.Module) -> dict[str, Any]:
    return {"optimizer": sgd}


def a_client_optimizer(model: nn.Module) -> dict[str, Any]:
    return {"optimizer": default_optimizer(model)}


@pytest.mark.parametrize("arguments", [named_parameters, a_callable, a_client_optimizer])
def test_the_ways_to_say_what_is_optimized(ranks, arguments):
    assert_parity(ranks, Training(perceptron, squared_output, arguments=arguments))


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adagrad, torch.optim.NAdam, torch.optim.RMSprop])
def test_client_optimizers_of_torch(ranks, kind):
    plain = partial(of_parameters, kind, {"lr": 0.01})
    training = Training(perceptron, squared_output, arguments=partial(as_client, plain), optimizer=plain)
    assert_parity(ranks, training, tolerance=1e-5)


def as_client(make: Any, model: nn.Module) -> dict[str, Any]:
    return {"optimizer": make(model)}


class SignDescent(torch.optim.Optimizer):
    """An optimizer that this package has never heard of, with a state and a scalar."""

    def __init__(self, params: Any, lr: float = 0.01):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    state["steps"] = state.get("steps", 0) + 1
                    state["mean"] = state.get("mean", torch.zeros_like(p)).lerp(p.grad, 0.5)
                    p.sub_(state["mean"].sign(), alpha=group["lr"] / state["steps"])


def test_a_client_optimizer_of_ones_own(ranks):
    plain = partial(of_parameters, SignDescent, {})
    training = Training(perceptron, squared_output, arguments=partial(as_client, plain), optimizer=plain)
    assert_parity(ranks, training)


SCHEDULES = [
    ("WarmupLR", {"warmup_min_lr": 0.01, "warmup_max_lr": 0.2, "warmup_num_steps": 3}),
    ("WarmupDecayLR", {"warmup_max_lr": 0.2, "warmup_num_steps": 2, "total_num_steps": 6}),
    ("WarmupCosineLR", {"warmup_num_steps": 2, "total_num_steps": 6}),
    ("OneCycle", {"cycle_min_lr": 0.01, "cycle_max_lr": 0.2, "cycle_first_step_size": 2}),
    ("LRRangeTest", {"lr_range_test_min_lr": 0.01, "lr_range_test_step_size": 1, "lr_range_test_step_rate": 1.0}),
]


def scheduled(kind: str, params: dict[str, object], optimizer: torch.optim.Optimizer) -> Any:
    return build_scheduler(kind, params, optimizer)


@pytest.mark.parametrize(("kind", "params"), SCHEDULES)
def test_each_schedule_of_the_configuration_steps_once_per_optimizer_step(ranks, kind, params):
    config = {"scheduler": {"type": kind, "params": params}}
    schedule = partial(scheduled, kind, params)
    assert_parity(ranks, Training(perceptron, squared_output, steps=5, accumulation=2, config=config, scheduler=schedule))


def halving(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)


def with_a_callable_schedule(model: nn.Module) -> dict[str, Any]:
    return {"lr_scheduler": halving}


def with_a_schedule_of_the_clients_optimizer(model: nn.Module) -> dict[str, Any]:
    optimizer = default_optimizer(model)
    return {"optimizer": optimizer, "lr_scheduler": halving(optimizer)}


@pytest.mark.parametrize("arguments", [with_a_callable_schedule, with_a_schedule_of_the_clients_optimizer])
def test_client_schedules(ranks, arguments):
    assert_parity(ranks, Training(perceptron, squared_output, steps=5, arguments=arguments, scheduler=halving))


def rates(stage: int) -> list[list[float]]:
    config = {
        "scheduler": {
            "type": "WarmupLR",
            "params": {"warmup_min_lr": 0.0, "warmup_max_lr": 0.4, "warmup_num_steps": 4, "warmup_type": "linear"},
        }
    }
    training = Training(perceptron, squared_output, accumulation=2, config=config, arguments=groups_as_model_parameters)
    engine = make_engine(training, stage)
    seen = []
    for index in range(4):
        squared_output(engine, index, engine.backward)
        engine.step()
        seen.append(engine.get_lr())
    return seen


def test_get_lr_is_that_of_each_parameter_group(ranks):
    for stage in (0, 2):
        seen = ranks(1, rates, stage)[0]
        assert seen == [[0.0] * 3, pytest.approx([0.1] * 3), pytest.approx([0.1] * 3), pytest.approx([0.2] * 3)]
