from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import deepspeed
from deepspeed.ops.adagrad import DeepSpeedCPUAdagrad
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from deepspeed.ops.lamb import FusedLamb
from deepspeed.ops.lion import DeepSpeedCPULion, FusedLion
from deepspeed.optim import Lamb, Lion

Make = Callable[[Any], torch.optim.Optimizer]

PAIRS: dict[str, tuple[Make, Make]] = {
    "cpu_adamw": (
        lambda p: DeepSpeedCPUAdam(p, lr=0.1, weight_decay=0.1, adamw_mode=True),
        lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
    ),
    "cpu_adam": (
        lambda p: DeepSpeedCPUAdam(p, lr=0.1, weight_decay=0.1, adamw_mode=False),
        lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.1),
    ),
    "fused_adam": (lambda p: FusedAdam(p, lr=0.1), lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.0)),
    "fused_lamb": (lambda p: FusedLamb(p, lr=0.1, weight_decay=0.1), lambda p: Lamb(p, lr=0.1, weight_decay=0.1)),
    "cpu_lion": (lambda p: DeepSpeedCPULion(p, lr=0.1, weight_decay=0.1), lambda p: Lion(p, lr=0.1, weight_decay=0.1)),
    "fused_lion": (lambda p: FusedLion(p, lr=0.1), lambda p: Lion(p, lr=0.1)),
    "cpu_adagrad": (lambda p: DeepSpeedCPUAdagrad(p, lr=0.1), lambda p: torch.optim.Adagrad(p, lr=0.1)),
}


def make_model() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 3))


def loss(model: nn.Module, index: int) -> torch.Tensor:
    return model(torch.randn(4, 5, generator=torch.Generator().manual_seed(index))).square().mean()


def train_plain(make: Make) -> nn.Module:
    model = make_model()
    optimizer = make(model.parameters())
    for index in range(3):
        ((loss(model, 2 * index) + loss(model, 2 * index + 1)) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def train_engine(name: str) -> dict[str, torch.Tensor]:
    model = make_model()
    config = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": 2}}
    engine = deepspeed.initialize(model=model, optimizer=PAIRS[name][0](model.parameters()), config=config)[0]
    rank = engine.global_rank
    for index in range(3):
        engine.backward(loss(engine, 2 * index + rank))
        engine.step()
    return {key: value.detach().clone() for key, value in model.state_dict().items()}


@pytest.mark.parametrize("name", PAIRS)
def test_a_documented_name_trains_as_its_counterpart_in_the_engine(ranks, name):
    expected = train_plain(PAIRS[name][1]).state_dict()
    for weights in ranks(2, train_engine, name):
        for key, value in expected.items():
            torch.testing.assert_close(weights[key], value, rtol=1e-5, atol=1e-6)


def test_the_groups_of_another_optimizer_are_taken_over():
    groups = torch.optim.SGD(make_model().parameters(), lr=0.5).param_groups
    optimizer = DeepSpeedCPUAdam(groups, lr=0.1, weight_decay=0.2, adamw_mode=True)
    assert optimizer.param_groups[0] is groups[0]
    assert optimizer.param_groups[0]["params"] == groups[0]["params"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: DeepSpeedCPUAdam(p, amsgrad=True), "DeepSpeedCPUAdam: amsgrad=True is not available; leave it at False"),
        (lambda p: DeepSpeedCPUAdam(p, fp32_optimizer_states=False), "fp32_optimizer_states=False is not available"),
        (lambda p: FusedAdam(p, set_grad_none=False), "FusedAdam: set_grad_none=False is not available"),
        (lambda p: FusedLamb(p, max_grad_norm=1.0), "set gradient_clipping in the configuration"),
    ],
)
def test_what_is_not_done_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make(make_model().parameters())


@pytest.mark.parametrize("kind", [DeepSpeedCPUAdam, DeepSpeedCPUAdagrad, DeepSpeedCPULion])
def test_states_of_16_bit_parameters_are_fp32_also_when_they_are_loaded(kind):
    parameter = nn.Parameter(torch.ones(7, dtype=torch.bfloat16))
    optimizer, other = kind([parameter], lr=0.1), kind([nn.Parameter(torch.ones(7, dtype=torch.bfloat16))], lr=0.1)
    parameter.grad = torch.linspace(0.1, 1, 7).bfloat16()
    optimizer.step()
    other.load_state_dict(optimizer.state_dict())
    (mine,), (loaded,) = optimizer.state.values(), other.state.values()
    for key, value in mine.items():
        assert value.dtype == torch.float32
        assert torch.equal(loaded[key], value)
    assert parameter.dtype == torch.bfloat16
    assert (parameter < 1).all()
