"""Configurations that integrations write, as they write them."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from deepspeed.config import load_config

LIGHTNING: dict[str, Any] = {
    "activation_checkpointing": {
        "partition_activations": False,
        "cpu_checkpointing": False,
        "contiguous_memory_optimization": False,
        "synchronize_checkpoint_boundary": False,
    },
    "aio": {
        "block_size": 1048576,
        "queue_depth": 8,
        "single_submit": False,
        "overlap_events": True,
        "thread_count": 1,
    },
    "zero_allow_untested_optimizer": True,
    "zero_optimization": {
        "stage": 2,
        "contiguous_gradients": True,
        "overlap_comm": True,
        "allgather_partitions": True,
        "reduce_scatter": True,
        "allgather_bucket_size": 200_000_000,
        "reduce_bucket_size": 200_000_000,
        "sub_group_size": 1_000_000_000_000,
    },
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 2,
    "gradient_clipping": 0.0,
    "fp16": {
        "enabled": True,
        "loss_scale": 0,
        "initial_scale_power": 16,
        "loss_scale_window": 1000,
        "hysteresis": 2,
        "min_loss_scale": 1,
    },
}

ACCELERATE: dict[str, Any] = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": 1,
    "zero_optimization": {
        "stage": 1,
        "offload_optimizer": {"device": "none", "nvme_path": None},
        "offload_param": {"device": "none", "nvme_path": None},
        "stage3_gather_16bit_weights_on_model_save": False,
    },
    "gradient_clipping": 1.0,
    "steps_per_print": float("inf"),
    "fp16": {"enabled": True, "auto_cast": True},
    "bf16": {"enabled": False},
}

TRANSFORMERS: dict[str, Any] = {
    "fp16": {
        "enabled": "auto",
        "loss_scale": 0,
        "loss_scale_window": 1000,
        "initial_scale_power": 16,
        "hysteresis": 2,
        "min_loss_scale": 1,
    },
    "bf16": {"enabled": "auto"},
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
    },
    "scheduler": {
        "type": "WarmupLR",
        "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"},
    },
    "zero_optimization": {
        "stage": 2,
        "allgather_partitions": True,
        "allgather_bucket_size": 2e8,
        "overlap_comm": True,
        "reduce_scatter": True,
        "reduce_bucket_size": "auto",
        "contiguous_gradients": True,
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": 2000,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
}


@pytest.mark.parametrize("config", [LIGHTNING, ACCELERATE, TRANSFORMERS], ids=["lightning", "accelerate", "transformers"])
def test_what_integrations_write_is_accepted_without_a_warning(config, caplog):
    with caplog.at_level(logging.WARNING, "DeepSpeed"):
        load_config(config, world_size=2)
    assert not caplog.records


def test_what_trl_adds_to_a_finished_configuration_counts():
    added = {
        "zero_optimization.reduce_bucket_size": 64 * 64,
        "zero_optimization.stage3_param_persistence_threshold": 10 * 64,
        "zero_optimization.stage3_prefetch_bucket_size": 0.9 * 64 * 64,
    }
    zero = load_config({**TRANSFORMERS, **added}).zero_optimization
    assert (zero.reduce_bucket_size, zero.stage3_param_persistence_threshold) == (4096, 640)
    assert zero.stage3_prefetch_bucket_size == 3686


def test_inference_with_a_scheduler_and_no_optimizer_is_fine():
    config = {key: value for key, value in TRANSFORMERS.items() if key != "optimizer"}
    loaded = load_config(config)
    assert loaded.optimizer is None and loaded.scheduler is not None and loaded.scheduler.params == {}


def test_offloading_written_as_false_is_none():
    zero = load_config({"zero_optimization": {"offload_optimizer": False, "offload_param": False}}).zero_optimization
    assert not (zero.offloads_optimizer or zero.offloads_parameters)


def test_a_sub_group_of_size_zero_is_accepted():
    assert load_config({"zero_optimization": {"sub_group_size": 0}}).zero_optimization.sub_group_size == 0
