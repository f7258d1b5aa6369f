"""Hugging Face's Trainer at every stage, against the same Trainer without this package in one process."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
import torch

from deepspeed import DeepSpeedEngine

from .common import assert_same, each_stage, each_stage_and_world, isolated
from .trainer import OPTIMIZER, SCHEDULER, Trained, auto_config, make_trainer, outcome

TOLERANCE = 1e-5


@cache
def plain(world: int, **options: Any) -> Trained:
    """The training without this package: all ranks' samples in one process."""

    @isolated
    def train() -> Trained:
        trainer = make_trainer("unused", per_device_train_batch_size=2 * world, **options)
        trainer.train()
        trainer.evaluate()
        return outcome(trainer)

    return train()


@isolated
def sharded(config: dict[str, Any] | str, options: dict[str, Any]) -> Trained:
    trainer = make_trainer("unused", deepspeed=config, **options)
    trainer.train()
    assert type(trainer.model_wrapped) is DeepSpeedEngine
    trainer.evaluate()
    return outcome(trainer)


def assert_trained_alike(actual: Trained, expected: Trained) -> None:
    for key in ("losses", "norms", "rates"):
        assert getattr(actual, key) == pytest.approx(getattr(expected, key), rel=TOLERANCE), key
    assert actual.metrics["eval_loss"] == pytest.approx(expected.metrics["eval_loss"], rel=TOLERANCE)
    assert_same(actual.weights, expected.weights, TOLERANCE)


@each_stage_and_world
def test_a_trainer_with_auto_values_trains_to_the_numbers_of_one_without(ranks, stage, world):
    for result in ranks(world, sharded, auto_config(stage), {}):
        assert_trained_alike(result, plain(world))


COMBINATIONS = {
    "their optimizer, their schedule": {},
    "our optimizer, their schedule": {"optimizer": OPTIMIZER},
    "their optimizer, our schedule": {"scheduler": SCHEDULER},
    "our optimizer, our schedule": {"optimizer": OPTIMIZER, "scheduler": SCHEDULER},
}


@pytest.mark.parametrize("sections", COMBINATIONS.values(), ids=COMBINATIONS.keys())
@each_stage
def test_optimizer_and_schedule_may_each_be_theirs_or_ours(ranks, stage, sections):
    expected = plain(2)
    for result in ranks(2, sharded, auto_config(stage, **sections), {}):
        assert result.losses == pytest.approx(expected.losses, rel=TOLERANCE)
        assert_same(result.weights, expected.weights, TOLERANCE)
        # A schedule that the engine steps has stepped when the rate is logged; one that the Trainer steps has not.
        shown = expected.rates[1:] + expected.rates[-1:] if sections else expected.rates
        assert result.rates == pytest.approx(shown)


def test_the_configuration_may_be_a_file(ranks, tmp_path):
    file = tmp_path / "ds_config.json"
    file.write_text(json.dumps(auto_config(2)))
    for result in ranks(2, sharded, str(file), {}):
        assert_trained_alike(result, plain(2))


@isolated
def in_bf16(stage: int) -> tuple[set[torch.dtype], set[torch.dtype], list[float]]:
    trainer = make_trainer("unused", deepspeed=auto_config(stage), bf16=True)
    trainer.train()
    masters = {partition.dtype for partition in trainer.optimizer.optimizer.single_partition_of_fp32_groups}
    return {p.dtype for p in trainer.model.parameters()}, masters, outcome(trainer).losses


@each_stage
def test_a_trainer_in_bf16_has_bf16_parameters_and_fp32_masters(ranks, stage):
    for parameters, masters, losses in ranks(2, in_bf16, stage):
        assert parameters == {torch.bfloat16} and masters == {torch.float32}
        assert losses == pytest.approx(plain(2).losses, rel=2e-3)
