"""Hooks of stage 3 that a library takes off while it generates, and has put back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deepspeed
from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
from tests.parity import Training, make_engine, state_of


def model() -> nn.Module:
    blocks = [nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3)]
    return nn.Sequential(nn.Linear(6, 8), *blocks, nn.Linear(8, 2).requires_grad_(False))


def engine_of(stage: int) -> deepspeed.DeepSpeedEngine:
    return make_engine(Training(model, lambda *_: None, config={}), stage)


def step(engine: deepspeed.DeepSpeedEngine, index: int) -> None:
    engine.backward(engine(torch.full((2, 6), float(index))).square().mean())
    engine.step()


def hooks(module: nn.Module) -> int:
    return sum(len(inner._forward_pre_hooks) + len(inner._forward_hooks) for inner in module.modules())


def without_hooks(engine: deepspeed.DeepSpeedEngine, x: Tensor) -> tuple[Tensor, int]:
    """The module's output and how many hooks it has, in the words of the libraries that take them off."""
    offload = engine.optimizer.parameter_offload
    with torch.no_grad(), deepspeed.zero.GatheredParameters(engine.module.parameters()):
        for _, parameter in [*offload.module.named_parameters(recurse=True), *offload.module.ds_external_parameters()]:
            parameter.ds_active_sub_modules.clear()
        for hook in [*offload.forward_hooks, *offload.backward_hooks]:
            hook.remove()
        offload.forward_hooks = []
        offload.backward_hooks = []
        output, count = engine.module(x), hooks(engine.module)
        offload._register_deepspeed_module(offload.module)
    return output, count


def interrupted(interrupts: bool) -> tuple[dict[str, Tensor], list[Any]]:
    engine = engine_of(3)
    x, found = torch.ones(3, 6), []
    for index in range(3):
        step(engine, index)
        if interrupts:
            before, expected = hooks(engine.module), engine(x).detach()
            output, count = without_hooks(engine, x)
            found.append((count, hooks(engine.module) == before > 0, torch.equal(output, expected)))
    state = state_of(engine.module)
    engine.destroy()
    return state, [*found, hooks(engine.module)]


def test_a_gathered_model_runs_without_hooks_and_trains_on_with_them(ranks):
    for (state, found), (expected, _) in zip(ranks(2, interrupted, True), ranks(2, interrupted, False), strict=True):
        assert found == [(0, True, True)] * 3 + [0]
        assert all(torch.equal(state[name], value) for name, value in expected.items())


def misused() -> tuple[bool, bool]:
    there = [hasattr(engine_of(stage).optimizer, "parameter_offload") for stage in (1, 2)]
    offload = engine_of(3).optimizer.parameter_offload
    with pytest.raises(ValueError, match=r"pass \.module"):
        offload._register_deepspeed_module(model())
    return any(there), isinstance(offload, DeepSpeedZeRoOffload)


def test_only_stage_3_has_hooks_to_take_off_and_they_go_back_to_their_own_module(ranks):
    for below, is_one in ranks(2, misused):
        assert not below and is_one
