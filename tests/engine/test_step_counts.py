"""Parameters that get no gradient in some steps: each takes its own number of steps, as in plain PyTorch."""

from __future__ import annotations

import copy
import json
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deepspeed.optim import Adam, Lamb, Muon, split_parameter_groups
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_get_local_optimizer_state,
    safe_set_full_optimizer_state,
)
from tests.engine.test_models import (
    WIDTH,
    Branches,
    last_branch_first_used_late,
    other_branches_in_each_step,
    other_branches_on_each_rank,
)
from tests.parity import Training, assert_close, assert_parity, generator, make_engine, state_of

ONE_BUCKET = {"zero_optimization": {"reduce_bucket_size": 10_000, "leaf_module": {"classes": ["Branches"]}}}
"""At stage 3 one unit as well, whatever branches a rank takes."""


def on_parameters(kind: Any, options: dict[str, float], model: nn.Module) -> torch.optim.Optimizer:
    return kind(model.parameters(), lr=0.01, **options)


def muon(model: nn.Module) -> torch.optim.Optimizer:
    return Muon(split_parameter_groups("Muon", [{"params": list(model.parameters())}]), lr=0.02)


def as_client(plain: Any, model: nn.Module) -> dict[str, Any]:
    return {"optimizer": plain(model)}


OPTIMIZERS = [
    partial(on_parameters, torch.optim.AdamW, {}),
    partial(on_parameters, torch.optim.Adagrad, {"lr_decay": 0.5}),
    partial(on_parameters, torch.optim.NAdam, {}),
    partial(on_parameters, torch.optim.SGD, {"momentum": 0.9, "dampening": 0.5}),
    partial(on_parameters, Adam, {}),
    partial(on_parameters, Lamb, {"weight_decay": 0.5}),
    muon,
]


def name_of(optimizer: Any) -> str:
    kind = optimizer.args[0] if isinstance(optimizer, partial) else Muon
    return f"{kind.__module__.split('.')[0]} {kind.__name__}"


@pytest.mark.parametrize("micro_step", [other_branches_in_each_step, other_branches_on_each_rank, last_branch_first_used_late])
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=name_of)
def test_steps_are_counted_by_parameter(ranks, micro_step, optimizer):
    training = Training(
        Branches, micro_step, steps=6, config=ONE_BUCKET, arguments=partial(as_client, optimizer), optimizer=optimizer
    )
    assert_parity(ranks, training, tolerance=1e-5)


def in_bf16(stage: int) -> list[bool]:
    config = {**ONE_BUCKET, "bf16": {"enabled": True}, "optimizer": {"type": "AdamW", "params": {"lr": 0.1}}}
    engine = make_engine(Training(Branches, other_branches_in_each_step, config=config), stage)
    same = []
    for step in range(4):
        before = {name: value.clone() for name, value in engine.module.state_dict().items()}
        x = torch.randn(3, WIDTH, generator=generator(step)).bfloat16()
        engine.backward(engine(x, 0, 1 + step % 2).float().square().mean())
        engine.step()
        for name, parameter in engine.module.named_parameters():
            same.append(torch.equal(parameter, safe_get_full_fp32_param(parameter).bfloat16()))
            same.append(torch.equal(parameter, before[name]) == (name[7] not in ("0", str(1 + step % 2))))
    return same


@pytest.mark.parametrize("stage", [0, 2])
def test_16_bit_parameters_follow_their_masters_and_the_unused_stay(ranks, stage):
    for same in ranks(2, in_bf16, stage):
        assert all(same)


TRAINING = Training(
    Branches, other_branches_in_each_step, config={**ONE_BUCKET, "optimizer": {"type": "NAdam", "params": {"lr": 0.01}}}
)


def train(engine, first: int, last: int) -> None:
    """The same samples in each step, whatever the number of ranks: layer 0 always, 1 and 2 in turns, 3 never."""
    rank, size = engine.communicator.rank, engine.communicator.size
    for step in range(first, last):
        x = torch.randn(6, WIDTH, generator=generator(step)).chunk(size)[rank]
        engine.backward(engine(x, 0, 1 + step % 2).square().mean())
        engine.step()


def saved(directory: str, stage: int) -> dict[str, Tensor]:
    engine = make_engine(TRAINING, stage)
    train(engine, 0, 3)
    engine.save_checkpoint(directory)
    train(engine, 3, 6)
    return state_of(engine.module)


def resumed(directory: str) -> list[dict[str, Tensor]]:
    results = []
    for stage in (0, 1, 2):
        engine = make_engine(TRAINING, stage)
        train(engine, 10 + stage, 12)
        engine.load_checkpoint(directory)
        train(engine, 3, 6)
        results.append(state_of(engine.module))
        engine.destroy()
    return results


@pytest.mark.parametrize(("size", "stage"), [(2, 2), (3, 1), (1, 0)])
def test_checkpoints_hold_each_parameters_count_at_any_world_size_and_stage(ranks, tmp_path, size, stage):
    expected = ranks(size, saved, str(tmp_path), stage)[0]
    index = json.loads((tmp_path / "global_step3" / "index.json").read_text())
    steps = {name: e["numbers"]["step"]["tensor"] for e in index["optimizer"]["parameters"] for name in e["names"]}
    assert steps == {f"layers.{layer}.{kind}": 3 - layer for layer in (0, 1, 2) for kind in ("weight", "bias")}
    for other in (1, 2, 3):
        for results in ranks(other, resumed, str(tmp_path)):
            for weights in results:
                assert_close(weights, expected, 1e-5)


def by_state_dict(stage: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    first, second = (make_engine(TRAINING, stage) for _ in range(2))
    train(first, 0, 3)
    second.load_state_dict(first.module.state_dict())
    second.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    for engine in (first, second):
        train(engine, 3, 6)
    return state_of(first.module), state_of(second.module)


@pytest.mark.parametrize("stage", [0, 2])
def test_the_optimizers_own_state_dict_holds_each_parameters_count(ranks, stage):
    for first, second in ranks(2, by_state_dict, stage):
        assert all(torch.equal(value, second[name]) for name, value in first.items())


def looked_at(stage: int) -> tuple[list[float], list[float], str, tuple[float, ...]]:
    engine = make_engine(TRAINING, stage)
    train(engine, 0, 3)
    weights = [layer.weight for layer in engine.module.layers]
    full = [float(safe_get_full_optimizer_state(weight, "step")) for weight in weights[:3]]
    local = [float(safe_get_local_optimizer_state(weight, "step")) for weight in weights[:3]]
    with pytest.raises(KeyError) as caught:
        safe_get_full_optimizer_state(weights[3], "exp_avg")
    safe_set_full_optimizer_state(weights[2], torch.full((WIDTH, WIDTH), 5.0), "exp_avg")
    changed, beside = (safe_get_full_optimizer_state(weight, "exp_avg") for weight in (weights[2], weights[1]))
    return full, local, str(caught.value), (float(changed.min()), float(changed.max()), float(beside.max()))


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_the_states_of_a_parameter_are_its_own_on_every_rank(ranks, stage):
    for full, local, message, (least, most, beside) in ranks(3, looked_at, stage):
        assert full == local == [3, 2, 1]
        assert "layers.3.weight: the optimizer NAdam has no state 'exp_avg'; it has none before its first step" in message
        assert least == most == 5 > beside
