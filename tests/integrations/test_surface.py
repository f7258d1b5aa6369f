"""How these libraries find this package and what they look for in it, asked by their own code."""

from __future__ import annotations

import inspect
import logging
from importlib.metadata import metadata
from typing import Any

import pytest
import torch
from accelerate.utils import compare_versions, extract_model_from_parallel
from accelerate.utils import is_deepspeed_available as found_by_accelerate
from torch import nn
from transformers.integrations.deepspeed import HfDeepSpeedConfig
from transformers.integrations.deepspeed import is_deepspeed_available as found_by_transformers
from transformers.testing_utils import CaptureLogger

import deepspeed
from deepspeed.utils import logger

from .common import each_stage, isolated, language_model
from .trainer import OPTIMIZER, SCHEDULER, auto_config, make_trainer


def test_the_package_is_found_and_new_enough():
    assert metadata("deepspeed")["Name"] == "deepspeed"
    assert found_by_transformers() and found_by_accelerate()
    # The highest version that any of them asks for.
    assert compare_versions("deepspeed", ">=", "0.18.6")
    assert HfDeepSpeedConfig({"zero_optimization": {"stage": 2}}).config


def test_lightning_finds_the_package():
    pytest.importorskip("lightning", reason="lightning is not installed: make test-integrations")
    from lightning.fabric.strategies.deepspeed import _DEEPSPEED_AVAILABLE, _DEEPSPEED_GREATER_EQUAL_0_16

    assert _DEEPSPEED_AVAILABLE and _DEEPSPEED_GREATER_EQUAL_0_16


def test_a_model_without_an_engine_is_unwrapped_to_itself():
    model = nn.Linear(1, 1)
    assert extract_model_from_parallel(model) is model


@isolated
def asked(stage: int) -> dict[str, Any]:
    config = auto_config(stage, optimizer=OPTIMIZER, scheduler=SCHEDULER)
    trainer = make_trainer("unused", deepspeed=config, log_level="info")
    with CaptureLogger(logger) as captured:
        trainer.train()
    logger.setLevel(logging.INFO)
    engine = trainer.model_wrapped
    fresh = deepspeed.initialize(model=language_model(), config={**engine.config, "zero_optimization": {"stage": stage}})
    return {
        "log": captured.out,
        "stage": engine.config.get("zero_optimization", {}).get("stage"),
        "raw": type(engine.config) is dict,
        "signature": "exclude_frozen_parameters" in inspect.signature(engine.save_checkpoint).parameters,
        "module": engine.module is trainer.model and engine.generation_config is trainer.model.generation_config,
        "first rate": fresh[3].get_last_lr(),
        "gathers": engine.zero_gather_16bit_weights_on_model_save(),
        "steps per print": engine.config["steps_per_print"],
    }


@each_stage
def test_an_engine_answers_what_transformers_asks(ranks, stage):
    first, second = ranks(2, asked, stage)
    assert "DeepSpeed info" in first.pop("log") and "DeepSpeed info" not in second.pop("log")
    expected = {"stage": stage, "raw": True, "signature": True, "module": True, "first rate": [0.0], "gathers": True}
    assert first == second == {**expected, "steps per print": float("inf")}


@isolated
def redirected(stage: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As Lightning calls a module's other methods through the engine: by patching the module's ``forward`` each time."""
    model = nn.Linear(3, 2)
    engine = deepspeed.initialize(
        model=model,
        config={"optimizer": {"type": "SGD", "params": {"lr": 0.1}}, "zero_optimization": {"stage": stage}},
    )[0]
    original = model.forward

    def once(x: torch.Tensor) -> torch.Tensor:
        model.forward = original
        return 2 * model(x)

    x = torch.ones(1, 3)
    model.forward = once
    return engine(x).detach(), 2 * engine(x).detach()


@each_stage
def test_an_engine_runs_the_forward_that_its_module_has_when_it_is_called(ranks, stage):
    for patched, twice in ranks(2, redirected, stage):
        assert torch.equal(patched, twice)
