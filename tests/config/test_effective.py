from __future__ import annotations

from typing import Any

import pytest

from deepspeed.config import DeepSpeedConfig, load_config
from deepspeed.config.effective import IDLE, effective_entries
from deepspeed.config.section import fields, unit_of

NO_UNIT = ("zero_optimization.stage", "data_efficiency.seed", "elasticity.version")
"""Numbers that count nothing."""


def entries(config: dict[str, Any], world_size: int = 1) -> dict[str, tuple[Any, str, str]]:
    loaded = load_config(config, world_size=world_size)
    return {entry.path: (entry.value, str(entry.origin), entry.idle) for entry in effective_entries(loaded)}


def test_every_key_appears_once_with_its_value_and_origin():
    paths = [entry.path for entry in effective_entries(load_config({}))]
    assert len(paths) == len(set(paths))
    inner = ("optimizer.", "scheduler.", "zero_optimization.zenflow.", "datastates_ckpt.", "tensor_parallel.partition_config.")
    expected = [path for path, _ in fields(DeepSpeedConfig) if not path.startswith(inner)]
    absent = ["optimizer", "scheduler", "zero_optimization.zenflow", "datastates_ckpt", "tensor_parallel.partition_config"]
    assert sorted(paths) == sorted(expected + absent)


def test_the_origin_is_the_file_the_default_another_name_the_triangle_or_auto():
    found = entries(
        {
            "train_batch_size": 16,
            "train_micro_batch_size_per_gpu": "auto",
            "zero_optimization": {"cpu_offload": False, "overlap_comm": "auto"},
            "optimizer": {"type": "AdamW", "params": {"lr": 3e-4}},
            "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": "auto"}},
        },
        world_size=2,
    )
    assert found["train_batch_size"] == (16, "given", "")
    assert found["gradient_clipping"] == (0.0, "default", "")
    assert found["train_micro_batch_size_per_gpu"][:2] == (
        8,
        "auto: 16 / (gradient_accumulation_steps 1 x 2 data-parallel ranks)",
    )
    assert found["zero_optimization.overlap_comm"] == (True, "auto: default", "")
    assert found["zero_optimization.offload_optimizer.device"][1] == "given as zero_optimization.cpu_offload (deprecated)"
    assert found["optimizer.params.lr"] == (3e-4, "given", "")
    assert found["scheduler.params.warmup_max_lr"] == (3e-4, "auto: from optimizer.params.lr", "")


def test_a_key_that_nothing_reads_says_why():
    found = entries({"zero_optimization": {"stage": 2, "stage3_max_live_parameters": 5}, "csv_monitor": {"enabled": False}})
    assert found["zero_optimization.stage3_max_live_parameters"] == (5, "given", "only stage 3 reads it")
    assert found["csv_monitor.job_name"][2] == "its section is off"
    assert found["csv_monitor.enabled"] == (False, "given", "")
    assert found["data_efficiency.data_sampling.enabled"][2] == "its section is off"
    assert entries({"aio": {"queue_depth": 4}})["aio.queue_depth"] == (4, "given", "only device nvme reads it")
    assert found["zero_optimization.offload_optimizer.ratio"][2] == "its device is none"
    on_disk = {"stage": 2, "offload_optimizer": {"device": "nvme", "nvme_path": "/nvme"}}
    assert entries({"zero_optimization": on_disk})["aio.queue_depth"][2] == ""
    assert entries({"csv_monitor": {"enabled": True}})["csv_monitor.job_name"][2] == ""


def test_a_list_that_was_given_is_one_entry():
    assert entries({"elasticity": {"micro_batch_sizes": [2]}})["elasticity.micro_batch_sizes"][:2] == ([2], "given")


@pytest.mark.parametrize("path", IDLE)
def test_what_nothing_reads_yet_exists_and_says_so(path):
    found = [entry for entry in effective_entries(load_config({})) if f"{entry.path}.".startswith(f"{path}.")]
    assert found
    assert all(entry.idle or entry.path.endswith((".enabled", ".device")) for entry in found)


@pytest.mark.parametrize(("path", "field"), list(fields(DeepSpeedConfig)))
def test_every_key_is_described_and_every_number_has_a_unit(path, field):
    assert field.description and field.description.endswith(".")
    if any(part in (int, float) for part in [field.annotation, *getattr(field.annotation, "__args__", ())]):
        assert unit_of(field) or path in NO_UNIT
