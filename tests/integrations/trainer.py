"""Trainings by Hugging Face's Trainer, with and without this package."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from .common import Texts, language_model, weights

AUTO: dict[str, Any] = {
    "zero_optimization": {
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto"},
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
}
"""What Transformers documents as a configuration that the training arguments fill in."""

OPTIMIZER = {
    "type": "AdamW",
    "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
}
SCHEDULER = {
    "type": "WarmupLR",
    "params": {
        "warmup_min_lr": "auto",
        "warmup_max_lr": "auto",
        "warmup_num_steps": "auto",
        "warmup_type": "linear",
    },
}


def auto_config(stage: int, **sections: Any) -> dict[str, Any]:
    return {**AUTO, "zero_optimization": {**AUTO["zero_optimization"], "stage": stage}, **sections}


def arguments(folder: Path | str, **options: Any) -> TrainingArguments:
    """Six steps of two micro-batches, clipped, with a warm-up; evaluated and saved where ``options`` say so."""
    given: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_grad_norm": 0.5,
        "learning_rate": 1e-2,
        # Above the rounding errors in a key's bias, whose gradient is zero: else Adam makes them large.
        "adam_epsilon": 1e-4,
        "warmup_steps": 2,
        "lr_scheduler_type": "constant_with_warmup",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "log_level": "error",
    }
    return TrainingArguments(**{**given, **options})


def make_trainer(folder: Path | str, model: Callable[[], nn.Module] = language_model, **options: Any) -> Trainer:
    return Trainer(model(), arguments(folder, **options), train_dataset=Texts(40), eval_dataset=Texts(16, seed=1))


@dataclass(frozen=True)
class Trained:
    """What a training left: for each step its loss, gradient norm and learning rate, and the final weights."""

    losses: list[float]
    norms: list[float]
    rates: list[float]
    weights: dict[str, Tensor]
    metrics: Mapping[str, float]


def outcome(trainer: Trainer) -> Trained:
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    losses, norms, rates = ([entry.get(key) for entry in steps] for key in ("loss", "grad_norm", "learning_rate"))
    metrics = {key: value for entry in trainer.state.log_history for key, value in entry.items() if key == "eval_loss"}
    return Trained(losses, norms, rates, weights(trainer.model), metrics)
