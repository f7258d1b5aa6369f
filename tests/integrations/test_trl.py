"""TRL's trainers over an engine: supervised fine-tuning, and a policy trained on what it generates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from deepspeed import DeepSpeedEngine

from .common import VOCABULARY, assert_same, each_stage, isolated, language_model, weights
from .trainer import auto_config

trl = pytest.importorskip("trl", reason="trl is not installed: make test-integrations")
datasets = pytest.importorskip("datasets", reason="datasets is not installed: make test-integrations")

TOLERANCE = 1e-5
WORDS = [f"w{index}" for index in range(VOCABULARY - 2)]
OPTIONS: dict[str, Any] = {
    "use_cpu": True,
    "max_steps": 4,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "adam_epsilon": 1e-4,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
    "log_level": "error",
    "bf16": False,
    "activation_checkpointing": False,
}


def tokenizer() -> PreTrainedTokenizerFast:
    """A word a token, made here."""
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<eos>", *WORDS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>")


def sentences(count: int, length: int) -> list[str]:
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(len(WORDS), (count, length), generator=generator)
    return [" ".join(WORDS[index] for index in row) for row in numbers.tolist()]


@isolated
def fine_tuned(folder: str, options: dict[str, Any]) -> tuple[dict[str, Tensor], list[float]]:
    data = datasets.Dataset.from_dict({"text": sentences(40, 8)})
    args = trl.SFTConfig(output_dir=folder, max_length=16, **{**OPTIONS, **options})
    trainer = trl.SFTTrainer(language_model(), args, train_dataset=data, processing_class=tokenizer())
    trainer.train()
    return weights(trainer.model), [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@each_stage
def test_supervised_fine_tuning_trains_to_the_numbers_of_a_trainer_without(ranks, tmp_path, stage):
    expected, losses = fine_tuned(str(tmp_path), {"per_device_train_batch_size": 8})
    for result, result_losses in ranks(2, fine_tuned, str(tmp_path), {"deepspeed": auto_config(stage)}):
        assert result_losses == pytest.approx(losses, rel=TOLERANCE)
        assert_same(result, expected, TOLERANCE)


def preference(completions: list[str], **_: Any) -> list[float]:
    """A reward for words with an even number."""
    return [sum(int(word[1:]) % 2 == 0 for word in text.split() if word.startswith("w")) for text in completions]


@isolated
def rewarded(folder: str, stage: int, options: dict[str, Any]) -> dict[str, Any]:
    data = datasets.Dataset.from_dict({"prompt": sentences(40, 4)})
    # With beta, a frozen reference model in an engine of its own.
    generation = {"num_generations": 4, "max_completion_length": 6, "beta": 0.1, **options}
    args = trl.GRPOConfig(output_dir=folder, **generation, deepspeed=auto_config(stage), **OPTIONS)
    trainer = trl.GRPOTrainer(f"{folder}/model", preference, args, train_dataset=data, processing_class=tokenizer())
    before = weights(trainer.model)
    trainer.train()
    after = weights(trainer.model)
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "engine": type(trainer.model_wrapped) is type(trainer.ref_model) is DeepSpeedEngine,
        "reference": all(torch.equal(value, before[name]) for name, value in weights(trainer.ref_model.module).items()),
        "changed": any(not torch.equal(after[name], before[name]) for name in before),
        "weights": after,
        "rewards": [entry["reward"] for entry in log],
        "norms": [entry["grad_norm"] for entry in log],
    }


@each_stage
def test_a_policy_is_trained_on_what_it_generates(ranks, tmp_path, stage):
    language_model().save_pretrained(tmp_path / "model")
    first, second = ranks(2, rewarded, str(tmp_path), stage, {})
    assert first["engine"] and first["changed"] and first["reference"]
    assert len(first["rewards"]) == OPTIONS["max_steps"] and min(first["norms"]) > 0
    assert_same(second["weights"], first["weights"])


def test_a_policy_generates_the_same_from_gathered_parameters_as_from_sharded_ones(ranks, tmp_path):
    language_model().save_pretrained(tmp_path / "model")
    gathered, _ = ranks(2, rewarded, str(tmp_path), 3, {"ds3_gather_for_generation": True})
    sharded, _ = ranks(2, rewarded, str(tmp_path), 3, {"ds3_gather_for_generation": False})
    assert gathered["rewards"] == sharded["rewards"]
    assert_same(gathered["weights"], sharded["weights"])
