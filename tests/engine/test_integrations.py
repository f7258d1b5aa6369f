"""What training libraries do with an engine and its optimizer, without those libraries."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import deepspeed
from deepspeed.runtime.base_optimizer import DeepSpeedOptimizer
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from tests.engine.test_engine import batch, ds_config, make_engine, make_model


class Wrapper:
    """As Lightning wraps an optimizer: an object of a class made at run time, below the optimizer's own, that has
    none of its attributes but ``optimizer``."""

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.optimizer = optimizer
        self.__class__ = type("Wrapped", (Wrapper, type(optimizer)), {})

    def step(self) -> None:
        self.optimizer.step()


def wrapped() -> tuple[bool, Any, Any, int, int]:
    engine, optimizer, _, _ = deepspeed.initialize(model=make_model(), config=ds_config(2))
    wrapper: Any = Wrapper(optimizer)
    known = isinstance(wrapper, DeepSpeedZeroOptimizer) and isinstance(wrapper, torch.optim.Optimizer)
    wrapper.param_groups[0]["lr"] = 0.25
    rank = engine.global_rank
    engine.backward(engine(batch(rank)).square().mean())
    wrapper.step()
    return known, engine.get_lr(), wrapper.defaults["momentum"], len(wrapper.state), engine.global_steps


def test_an_optimizer_survives_being_wrapped_by_a_class_made_at_run_time(ranks):
    for known, lr, momentum, states, steps in ranks(2, wrapped):
        assert known and lr == [0.25] and momentum == 0.9 and steps == 0
        assert states > 0


def stepped_directly(stage: int) -> dict[str, torch.Tensor]:
    engine, optimizer, _, _ = deepspeed.initialize(model=make_model(), config=ds_config(stage))
    rank, size = engine.communicator.rank, engine.communicator.size
    for index in range(2):
        engine.backward(engine(batch(index * size + rank)).square().mean())
        optimizer.step()
    assert len(engine._accumulation.losses) == 1
    return {name: value.detach().clone() for name, value in engine.module.state_dict().items()}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_optimizer_can_be_stepped_in_place_of_the_engine(ranks, stage):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(2):
        for index in range(2):
            (model(batch(step * 2 + index)).square().mean() / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    for result in ranks(2, stepped_directly, stage):
        for name, value in model.state_dict().items():
            torch.testing.assert_close(result[name], value, rtol=1e-6, atol=1e-7)


def attributes() -> dict[str, object]:
    model = make_model()
    client = torch.optim.SGD(model.parameters(), lr=0.1)
    engine, optimizer, _, _ = deepspeed.initialize(model=model, optimizer=client, config={"bf16": {"enabled": True}})
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    partitions = optimizer.single_partition_of_fp32_groups
    return {
        "inner": optimizer.optimizer is client and optimizer.param_groups is client.param_groups,
        "base": isinstance(optimizer, DeepSpeedOptimizer),
        "overflow": optimizer.overflow,
        "scale": (optimizer.loss_scale, optimizer.cur_scale),
        "scheduled": (scheduler.get_last_lr(), engine.get_lr()),
        "partitions": all(part.dtype == torch.float32 for part in partitions),
        "model": next(engine.parameters()).dtype,
        "state": sorted(optimizer.state_dict()),
        "name": engine.optimizer_name(),
    }


def test_the_optimizer_has_what_integrations_read(ranks):
    assert ranks(1, attributes)[0] == {
        "inner": True,
        "base": True,
        "overflow": False,
        "scale": (1.0, 1.0),
        "scheduled": ([0.05], [0.05]),
        "partitions": True,
        "model": torch.bfloat16,
        "state": ["fp32_flat_groups", "optimizer", "partition_count", "scaler", "segments", "zero_stage"],
        "name": "SGD",
    }


def without_scheduler() -> tuple[float, float]:
    schedule = {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 4, "warmup_max_lr": 0.1}}}
    engine = make_engine(1, **schedule)
    assert engine.scheduler_name() == "WarmupLR"
    engine.lr_scheduler = None
    before = engine.get_lr()[0]
    engine.backward(engine(batch(0)).square().mean())
    engine.step()
    return before, engine.get_lr()[0]


def test_a_scheduler_that_is_taken_away_is_not_stepped(ranks):
    before, after = ranks(1, without_scheduler)[0]
    assert before == after


def destroyed_and_given_again() -> tuple[int, bool]:
    model = make_model()
    for _ in range(2):
        engine = deepspeed.initialize(model=model, config=ds_config(2))[0]
        engine.backward(engine(batch(0)).square().mean())
        engine.step()
        engine.destroy()
    return engine.global_steps, engine.module is model


def test_a_model_is_given_to_another_engine_after_the_first_was_destroyed(ranks):
    assert ranks(2, destroyed_and_given_again) == [(1, True)] * 2
