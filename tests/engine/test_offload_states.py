"""States that are taken off the device for a while: training goes on with the same bits, and meanwhile nobody uses them.

On a CPU nothing has anywhere to go. To see memory go, the rule that says so is replaced: states then move from one memory of
the CPU to another.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deepspeed
from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum, OffloadStateTypeEnum
from deepspeed.runtime.zero.offload_states import get_state_devices
from deepspeed.utils import safe_get_full_fp32_param
from deepspeed.zero import offload_states
from tests.parity import Training, assert_close, assert_equal, generator, make_engine, state_of, train_plain

WIDTH = 12
ADAM = {"optimizer": {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}}}
BF16 = {**ADAM, "bf16": {"enabled": True}}
States = OffloadStateTypeEnum


class Blocks(nn.Module):
    """The first block is frozen, the last norm small: whole at stage 3."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(3)])
        self.norm = nn.LayerNorm(WIDTH)
        self.blocks[0].requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = torch.tanh(block(x))
        return self.norm(x)


def squares(model: nn.Module, index: int, backward: Any) -> None:
    x = torch.randn(4, WIDTH, generator=generator(index)).to(next(model.parameters()).dtype)
    backward((model(x).float() - 1).square().mean())


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)


PLAIN = Training(Blocks, squares, steps=4, accumulation=2, config=ADAM, optimizer=adamw)


@contextmanager
def everything_leaves() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(offload_states, "leaves", lambda storage: storage.resizable())
        yield


def weights_of(stage: int, config: dict[str, Any], away: list[set[States]]) -> dict[str, Tensor]:
    """Train four steps; around each micro-step's forward and backward, ``away[0]`` is away, ``away[1]`` between backward
    and step, and ``away[2]`` after a step."""
    engine = make_engine(Training(Blocks, squares, accumulation=2, config=config), stage)
    rank, size = engine.communicator.rank, engine.communicator.size
    for index in range(8):
        engine.offload_states(away[0])
        squares(engine, index * size + rank, engine.backward)
        engine.reload_states()
        engine.offload_states(away[1], non_blocking=True)
        engine.reload_states(non_blocking=True)
        engine.step()
        for state in away[2]:
            engine.offload_states([state])
        engine.reload_states()
    weights = state_of(engine.module)
    engine.destroy()
    return weights


def with_and_without(stage: int, config: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    everything = set(States)
    plain = weights_of(stage, config, [set(), set(), set()])
    with everything_leaves():
        away = [{States.optim_states, States.hp_params}, everything, everything]
        return plain, weights_of(stage, config, away)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("config", [ADAM, BF16], ids=["fp32", "bf16"])
def test_training_goes_on_with_the_same_bits(ranks, stage, config):
    for expected, weights in ranks(2, with_and_without, stage, config):
        assert_equal(weights, expected)
        if config is ADAM:
            assert_close(weights, train_plain(PLAIN, 2).weights, 1e-5)


def bytes_while_away(stage: int, config: dict[str, Any], include: list[str] | None) -> list[Any]:
    """After a backward that is not the last of its step, so that each state has memory where it ever has."""
    engine = make_engine(Training(Blocks, squares, accumulation=2, config=config), stage)
    for index in range(3):
        squares(engine, index, engine.backward)
        engine.step()
    before = engine.model_state_bytes()
    with everything_leaves():
        engine.offload_states(include)
    away = engine.model_state_bytes()
    shapes = [tuple(p.shape) for p in engine.module.parameters()]
    engine.reload_states()
    after = engine.model_state_bytes()
    engine.destroy()
    return [before, away, after, shapes]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("config", [ADAM, BF16], ids=["fp32", "bf16"])
def test_the_memory_of_all_states_goes(ranks, stage, config):
    for before, away, after, shapes in ranks(2, bytes_while_away, stage, config, None):
        # Adam's step numbers are on the CPU on any device, but for this test's rule they leave too.
        assert (away.parameters, away.gradients, away.master, away.optimizer) == (0, 0, 0, 0)
        assert before.total > 0 and after == before
        assert set(shapes) == {(0,)}


@pytest.mark.parametrize("stage", [1, 3])
def test_what_is_not_named_stays(ranks, stage):
    """Masters of a bf16 model have memory of their own; those of an fp32 model are its parameters, which stay."""
    for before, away, _, _ in ranks(2, bytes_while_away, stage, BF16, ["optim_states", "hp_params"]):
        assert (away.master, away.optimizer) == (0, 0)
        assert (away.parameters, away.gradients) == (before.parameters, before.gradients) and before.master > 0
    for before, away, _, _ in ranks(2, bytes_while_away, stage, ADAM, ["optim_states", "hp_params"]):
        assert away.optimizer == 0 and away.parameters == before.parameters


def refusals(stage: int, include: list[States] | None) -> dict[str, str]:
    """What each call says while states are away, and nothing afterwards."""
    engine = make_engine(Training(Blocks, squares, config=ADAM), stage)
    x = torch.ones(2, WIDTH)
    engine.backward(engine(x).sum())
    engine.step()
    loss = engine(x).sum()
    weight = engine.module.blocks[1].weight
    calls = {
        "forward": lambda: engine(x),
        "module": lambda: engine.module(x),
        "block": lambda: engine.module.blocks[1](x),
        "backward": lambda: engine.backward(loss),
        "step": lambda: engine.optimizer.step(),
        "save": lambda: engine.save_checkpoint("/nowhere"),
        "load": lambda: engine.load_checkpoint("/nowhere"),
        "state dict": lambda: engine._zero3_consolidated_16bit_state_dict(),
        "look": lambda: safe_get_full_fp32_param(weight),
        "gather": lambda: deepspeed.zero.GatheredParameters([weight]).__enter__(),
    }
    engine.offload_states(include)
    said = {}
    for name, call in calls.items():
        try:
            call()
        except RuntimeError as error:
            said[name] = str(error)
    engine.reload_states()
    engine.zero_grad()
    engine.backward(engine(x).sum())
    engine.step()
    return said


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_who_needs_what_is_away_is_told_to_bring_it_back(ranks, stage):
    for said in ranks(1, refusals, stage, None):
        expected = {"forward", "module", "block", "backward", "step", "save", "load", "state dict", "look"}
        assert said.keys() == expected | ({"gather"} if stage == 3 else set())
        assert all("call engine.reload_states() before" in message for message in said.values())
        assert "forward of 'blocks.1'" in said["block"] and "lp_params" in said["block"]
    for said in ranks(2, refusals, stage, [States.optim_states]):
        assert said.keys() == {"step", "save", "load", "look"}
        assert "a step needs optim_states" in said["step"]


def places() -> list[Any]:
    engine = make_engine(Training(Blocks, squares, config=ADAM), 3)
    seen: list[Any] = [get_state_devices(engine, state) for state in States]
    squares(engine, 0, engine.backward)
    engine.offload_states(device="cpu", pin_memory=False)
    seen += [get_state_devices(engine, state) for state in States]
    for wrong in (OffloadDeviceEnum.nvme, OffloadDeviceEnum.none, "disk"):
        with pytest.raises(ValueError, match=r"nvme|none|disk"):
            engine.offload_states(device=wrong)
    with pytest.raises(ValueError, match="weights"):
        engine.offload_states(["weights"])
    return seen


def test_the_devices_of_states_can_be_asked_for(ranks):
    cpu = {torch.device("cpu")}
    (seen,) = ranks(1, places)
    assert seen[:5] == [set(), cpu, cpu, set(), set()]
    assert seen[5:] == [set(), cpu, cpu, cpu, set()]


def inside_gathered() -> str:
    engine = make_engine(Training(Blocks, squares, config=ADAM), 3)
    with deepspeed.zero.GatheredParameters(engine.module), pytest.raises(RuntimeError) as caught:
        engine.offload_states()
    return str(caught.value)


def test_gathered_parameters_are_not_taken_away(ranks):
    assert "inside zero.GatheredParameters" in ranks(2, inside_gathered)[0]


def destroyed(stage: int) -> bool:
    engine = make_engine(Training(Blocks, squares, config=ADAM), stage)
    before = state_of(engine.module)
    with everything_leaves():
        engine.offload_states()
    engine.destroy()
    after = state_of(engine.module)
    return all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("stage", [1, 3])
def test_destroy_brings_the_parameters_back(ranks, stage):
    assert ranks(2, destroyed, stage) == [True, True]
