"""LoRA by PEFT through Hugging Face's Trainer: frozen weights beside the trained ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor, nn

from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

from .common import assert_same, each_stage, isolated, language_model, weights
from .trainer import auto_config, make_trainer, outcome

peft = pytest.importorskip("peft", reason="peft is not installed: make test-integrations")

TOLERANCE = 1e-5


def with_adapters(seed: int = 3) -> nn.Module:
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    return peft.get_peft_model(language_model(seed), config)


@isolated
def trained(folder: str, options: dict[str, Any]) -> tuple[dict[str, Tensor], list[float], int]:
    trainer = make_trainer(folder, with_adapters, **options)
    trainer.train()
    trainer.save_model(f"{folder}/final")
    slices = getattr(trainer.optimizer.optimizer, "single_partition_of_fp32_groups", [])
    return weights(trainer.model), outcome(trainer).losses, sum(part.numel() for part in slices)


@each_stage
def test_adapters_train_to_the_numbers_of_a_trainer_without_and_only_they_are_sharded(ranks, tmp_path, stage):
    expected, losses, _ = trained(str(tmp_path / "plain"), {"per_device_train_batch_size": 4})
    adapters = sum(p.numel() for p in with_adapters().parameters() if p.requires_grad)
    for result, result_losses, held in ranks(2, trained, str(tmp_path), {"deepspeed": auto_config(stage)}):
        assert_same(result, expected, TOLERANCE)
        assert result_losses == pytest.approx(losses, rel=TOLERANCE)
        share = adapters if stage == 0 else adapters / 2
        assert share <= held < 1.5 * share
    saved = load_file(tmp_path / "final/adapter_model.safetensors")
    assert sum(value.numel() for value in saved.values()) == adapters


@isolated
def interrupted(folder: str, stage: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    options = {"deepspeed": auto_config(stage), "save_strategy": "steps", "save_steps": 3}
    whole = make_trainer(folder, with_adapters, **options)
    whole.train()
    # The base model, which the checkpoint leaves out, is the same; the adapters are others.
    resumed = make_trainer(folder, with_adapters, **options)
    for name, parameter in resumed.model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    resumed.train(resume_from_checkpoint=f"{folder}/checkpoint-3")
    return weights(whole.model), weights(resumed.model)


@each_stage
def test_a_checkpoint_has_the_adapters_alone_and_a_training_goes_on_from_it(ranks, tmp_path, stage):
    for whole, resumed in ranks(2, interrupted, str(tmp_path), stage):
        assert_same(resumed, whole)
    checkpoint = tmp_path / "checkpoint-3"
    state = get_fp32_state_dict_from_zero_checkpoint(checkpoint)
    assert state and all("lora_" in name for name in state)
    saved = load_file(checkpoint / "adapter_model.safetensors")
    assert_same({name.replace(".default", ""): value for name, value in state.items()}, saved)
    random_states = 2 * (16 << 10)  # of two ranks
    assert size_of(checkpoint / "global_step3") < 20 * sum(value.nbytes for value in saved.values()) + random_states


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())
