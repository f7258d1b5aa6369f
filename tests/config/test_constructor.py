"""``DeepSpeedConfig(...)``, as scripts call it."""

from __future__ import annotations

import base64
import copy
import json
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import deepspeed
from deepspeed.config import ConfigError, load_config
from deepspeed.runtime.config import DeepSpeedConfig

GIVEN = {"train_batch_size": 8, "zero_optimization": {"stage": 2, "reduce_bucket_size": "5e8"}, "bf16": {"enabled": "auto"}}


def as_path(path: Path) -> object:
    path.write_text(json.dumps(GIVEN))
    return path


def as_file_name(path: Path) -> object:
    return str(as_path(path))


def as_dictionary(path: Path) -> object:
    return copy.deepcopy(GIVEN)


def as_json(path: Path) -> object:
    return json.dumps(GIVEN)


def as_base64(path: Path) -> object:
    return base64.urlsafe_b64encode(json.dumps(GIVEN).encode()).decode()


@pytest.mark.parametrize("given", [as_path, as_file_name, as_dictionary, as_json, as_base64])
def test_a_configuration_is_made_from_whatever_holds_it(tmp_path, given):
    config = DeepSpeedConfig(given(tmp_path / "ds_config.json"))
    assert deepspeed.DeepSpeedConfig is DeepSpeedConfig and isinstance(config, DeepSpeedConfig)
    assert (config.train_batch_size, config.gradient_accumulation_steps) == (8, 1)
    assert config.zero_optimization.stage == 2 and config.zero_optimization.reduce_bucket_size == 500_000_000
    assert config.raw == GIVEN and str(config.origin("bf16.enabled")) == "auto: default"
    assert config == load_config(GIVEN)


def test_mistakes_are_answered_as_by_initialize():
    with pytest.raises(ConfigError, match="stage"):
        DeepSpeedConfig({"zero_optimization": {"stage": 7}})
    with pytest.raises(ConfigError, match="neither an existing file"):
        DeepSpeedConfig("nowhere.json")


def test_a_configuration_survives_copying_pickling_and_pydantics_own_ways():
    config = DeepSpeedConfig(GIVEN)
    for other in (copy.deepcopy(config), pickle.loads(pickle.dumps(config)), config.model_copy()):
        assert other == config and other.raw == GIVEN and other.sources == config.sources
    again = DeepSpeedConfig.model_validate(config.model_dump())
    assert isinstance(again, DeepSpeedConfig) and again.model_dump() == config.model_dump()
    assert DeepSpeedConfig.model_validate_json(config.model_dump_json()).model_dump() == config.model_dump()


def test_batch_sizes_are_those_of_the_data_parallel_ranks():
    mpu: Any = SimpleNamespace(get_data_parallel_world_size=lambda: 4)
    assert DeepSpeedConfig(GIVEN, mpu=mpu).train_micro_batch_size_per_gpu == 2
    assert DeepSpeedConfig(GIVEN, mpu).train_micro_batch_size_per_gpu == 2
    assert DeepSpeedConfig(GIVEN).train_micro_batch_size_per_gpu == 8


def on_ranks() -> tuple[int, int, str]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data_parallel", "sequence_parallel"))
    other = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    with pytest.raises(ConfigError) as caught:
        DeepSpeedConfig(GIVEN, mesh_device=other)
    assert dist.get_world_size() == 4
    whole, along = DeepSpeedConfig(GIVEN), DeepSpeedConfig(GIVEN, mesh_device=mesh)
    return whole.train_micro_batch_size_per_gpu, along.train_micro_batch_size_per_gpu, str(caught.value)


def test_ranks_are_those_of_the_process_group_or_of_the_mesh(ranks):
    for whole, along, message in ranks(4, on_ranks):
        assert (whole, along) == (2, 4)
        assert "mesh_device has the dimensions ('a', 'b')" in message
