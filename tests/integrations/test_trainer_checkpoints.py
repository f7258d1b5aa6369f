"""What Hugging Face's Trainer saves through an engine, and goes on from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import GPT2LMHeadModel

import deepspeed
from deepspeed.utils.zero_to_fp32 import load_state_dict_from_zero_checkpoint

from .common import assert_same, each_stage, isolated, language_model, weights
from .trainer import OPTIMIZER, SCHEDULER, auto_config, make_trainer, outcome


@isolated
def interrupted(folder: str, config: dict[str, Any], options: dict[str, Any]) -> tuple[Any, Any]:
    """A training that saves at step 3 and goes on to 6, and another that begins there."""
    options = {"deepspeed": config, "save_strategy": "steps", "save_steps": 3, **options}
    whole = make_trainer(folder, **options)
    whole.train()
    # A model of other values, so that nothing is right by accident.
    resumed = make_trainer(folder, lambda: language_model(seed=9), **options)
    resumed.train(resume_from_checkpoint=f"{folder}/checkpoint-3")
    assert resumed.model_wrapped.global_steps == resumed.state.global_step == 6
    return outcome(whole), outcome(resumed)


@pytest.mark.parametrize(
    ("sections", "bf16"),
    [({}, False), ({"optimizer": OPTIMIZER, "scheduler": SCHEDULER}, True)],
    ids=["theirs in fp32", "ours in bf16"],
)
@each_stage
def test_a_training_goes_on_from_a_checkpoint_to_the_same_bits(ranks, tmp_path, stage, sections, bf16):
    for whole, resumed in ranks(2, interrupted, str(tmp_path), auto_config(stage, **sections), {"bf16": bf16}):
        assert_same(resumed.weights, whole.weights)
        assert resumed.losses[3:] == whole.losses[3:]
        assert resumed.norms[3:] == whole.norms[3:] and resumed.rates[3:] == whole.rates[3:]


@isolated
def with_the_best_model(folder: str, stage: int) -> tuple[str, dict[str, Tensor]]:
    options = {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 2, "eval_steps": 2}
    # A learning rate at which the loss soon rises.
    options |= {"load_best_model_at_end": True, "learning_rate": 0.5, "max_grad_norm": 0.0}
    trainer = make_trainer(folder, deepspeed=auto_config(stage), **options)
    trainer.train()
    trainer.evaluate()
    return trainer.state.best_model_checkpoint, weights(trainer.model), trainer.state


@each_stage
def test_the_best_model_is_there_at_the_end(ranks, tmp_path, stage):
    for best, loaded, state in ranks(2, with_the_best_model, str(tmp_path), stage):
        assert Path(best).name == "checkpoint-2"
        saved = load_file(f"{best}/model.safetensors")
        assert_same({name: loaded[name] for name in saved}, saved)
        assert state.log_history[-1]["eval_loss"] == pytest.approx(state.best_metric, rel=1e-6)


@isolated
def saved_model(folder: str, stage: int) -> dict[str, Tensor]:
    trainer = make_trainer("unused", deepspeed=auto_config(stage))
    trainer.train()
    trainer.save_model(folder)
    return weights(trainer.model)


@each_stage
def test_a_saved_model_is_loaded_without_this_package(ranks, tmp_path, stage):
    for trained in ranks(2, saved_model, str(tmp_path), stage):
        assert_same(weights(GPT2LMHeadModel.from_pretrained(tmp_path)), trained)


@isolated
def skipping_in_fp16(folder: str, stage: int) -> dict[str, Any]:
    """A training of which no step succeeds: the loss scale begins far too high."""
    sections = {"fp16": {"enabled": "auto", "initial_scale_power": 60}, "optimizer": OPTIMIZER, "scheduler": SCHEDULER}
    options = {"fp16": True, "save_strategy": "steps", "save_steps": 6}
    trainer = make_trainer(folder, deepspeed=auto_config(stage, **sections), **options)
    before = weights(trainer.model.half())
    trainer.train()
    engine = trainer.model_wrapped
    return {
        "same": all(torch.equal(value, before[name]) for name, value in weights(trainer.model).items()),
        "skipped": (engine.skipped_steps, trainer.state.global_step, trainer.accelerator.optimizer_step_was_skipped),
        "rates": outcome(trainer).rates,
    }


@each_stage
def test_skipped_steps_count_for_checkpoints_and_not_for_the_schedule(ranks, tmp_path, stage):
    for result in ranks(2, skipping_in_fp16, str(tmp_path), stage):
        assert result == {"same": True, "skipped": (6, 6, True), "rates": [0.0] * 6}
    assert (tmp_path / "checkpoint-6/latest").read_text() == "global_step6"


@isolated
def filled_from_a_checkpoint(folder: str, stage: int) -> bool:
    trainer = make_trainer(folder, deepspeed=auto_config(stage), save_strategy="steps", save_steps=6)
    trainer.train()
    trained = weights(trainer.model)
    with deepspeed.zero.GatheredParameters(trainer.model, modifier_rank=0):
        for parameter in trainer.model.parameters():
            parameter.data.zero_()
    model = load_state_dict_from_zero_checkpoint(trainer.model, f"{folder}/checkpoint-6")
    return all(torch.equal(value, trained[name]) for name, value in weights(model).items())


@each_stage
def test_a_model_is_filled_from_the_trainers_checkpoint(ranks, tmp_path, stage):
    assert ranks(2, filled_from_a_checkpoint, str(tmp_path), stage) == [True, True]
