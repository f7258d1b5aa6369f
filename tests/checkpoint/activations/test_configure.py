from __future__ import annotations

import base64
import json
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

import deepspeed
from deepspeed.checkpoint.activations import checkpointing
from deepspeed.config import ConfigError, load_config
from tests.checkpoint.activations.support import AllRanks, configured

EVERYTHING = {
    "partition_activations": True,
    "cpu_checkpointing": True,
    "contiguous_memory_optimization": True,
    "number_checkpoints": 4,
    "synchronize_checkpoint_boundary": True,
    "profile": True,
}


def active() -> dict[str, Any]:
    return checkpointing._PROCESS.active.settings.model_dump()


def test_what_is_none_stays_as_it_is():
    with configured():
        assert not deepspeed.checkpointing.is_configured() and not any(active().values())
        deepspeed.checkpointing.configure(None, profile=True, synchronize=True)
        # As Lightning calls it.
        deepspeed.checkpointing.configure(
            mpu_=None, partition_activations=True, contiguous_checkpointing=None, checkpoint_in_cpu=None, profile=False
        )
        assert deepspeed.checkpointing.is_configured()
        assert {key for key, value in active().items() if value} == {
            "partition_activations",
            "synchronize_checkpoint_boundary",
        }


@pytest.mark.parametrize("form", ["mapping", "file", "json", "base64", "loaded"])
def test_a_configuration_sets_everything_and_arguments_overwrite_it(form, tmp_path):
    # The batch sizes fit no number of ranks that is known here.
    values = {"train_batch_size": 6, "train_micro_batch_size_per_gpu": 4, "activation_checkpointing": EVERYTHING}
    text = json.dumps(values)
    (tmp_path / "ds_config.json").write_text(text)
    source = {
        "mapping": values,
        "file": tmp_path / "ds_config.json",
        "json": text,
        "base64": base64.b64encode(text.encode()).decode(),
        "loaded": load_config({"activation_checkpointing": EVERYTHING}),
    }[form]
    with configured():
        deepspeed.checkpointing.configure(None, deepspeed_config=source)  # type: ignore[arg-type]
        assert active() == EVERYTHING
        deepspeed.checkpointing.configure(None, deepspeed_config=source, num_checkpoints=7)  # type: ignore[arg-type]
        assert active() == {**EVERYTHING, "number_checkpoints": 7}
        deepspeed.checkpointing.configure(None, deepspeed_config={})
        assert not any(active().values())


def test_single_settings_can_be_changed_without_configuring():
    with configured():
        deepspeed.checkpointing.set_num_layers(12)
        deepspeed.checkpointing.partition_activations_in_checkpoint(True)
        assert not deepspeed.checkpointing.is_configured()
        deepspeed.checkpointing.configure(None, contiguous_checkpointing=True)
        assert active()["number_checkpoints"] == 12 and active()["partition_activations"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"contiguous_checkpointing": True, "num_checkpoints": 4},
            "activation_checkpointing.partition_activations: is false; contiguous_memory_optimization works with it alone",
        ),
        (
            {"contiguous_checkpointing": True, "partition_activations": True},
            "activation_checkpointing.number_checkpoints: is missing; contiguous_memory_optimization needs the number",
        ),
        ({"num_checkpoints": 0}, "number_checkpoints: found 0, expected at least 1"),
        ({"num_checkpoints": "many"}, 'number_checkpoints: found "many", expected a whole number'),
        ({"checkpoint_in_cpu": 3}, "cpu_checkpointing: found 3, expected true or false"),
        ({"deepspeed_config": {"activation_checkpointing": {"cpu_checkpoint": True}}}, "did you mean 'cpu_checkpointing'?"),
        ({"deepspeed_config": "nowhere.json"}, "neither an existing file, nor JSON"),
        ({"deepspeed_config": 3}, "a configuration is a path, a dictionary"),
    ],
)
def test_settings_that_are_wrong_are_an_error_and_change_nothing(arguments, message):
    with configured(profile=True):
        before = active()
        with pytest.raises(ConfigError) as caught:
            deepspeed.checkpointing.configure(None, **arguments)
        assert message in str(caught.value)
        assert active() == before


def test_contradictions_are_found_as_the_configuration_is_read():
    with pytest.raises(ConfigError) as caught:
        load_config({"activation_checkpointing": {"contiguous_memory_optimization": True}})
    assert "2 problems" in str(caught.value)
    assert "partition_activations: is false" in str(caught.value) and "number_checkpoints: is missing" in str(caught.value)


def test_buffers_cannot_lose_what_they_need_afterwards():
    with configured(partition_activations=True, contiguous_checkpointing=True, num_checkpoints=4):
        with pytest.raises(ConfigError, match="partition_activations: is false"):
            deepspeed.checkpointing.partition_activations_in_checkpoint(False)
        with pytest.raises(ConfigError, match="number_checkpoints: found 0"):
            deepspeed.checkpointing.set_num_layers(0)


class OnlyRank:
    def get_model_parallel_rank(self) -> int:
        return 0


def test_an_mpu_without_its_methods_is_an_error_that_lists_them():
    with configured(), pytest.raises(TypeError) as caught:
        deepspeed.checkpointing.configure(OnlyRank())  # type: ignore[arg-type]
    assert "has no get_model_parallel_world_size, get_model_parallel_group. Without model parallelism give None" in str(
        caught.value
    )


class Muddled(AllRanks):
    def get_model_parallel_rank(self) -> int:
        return 0


def configure_muddled() -> str:
    try:
        with configured(Muddled(), partition_activations=True):
            return ""
    except ValueError as error:
        return str(error)


def test_an_mpu_whose_rank_is_not_that_of_its_group_is_an_error(ranks):
    first, second = ranks(2, configure_muddled)
    assert first == ""
    assert "mpu_ says that this is model-parallel rank 0 of 2, but in its model-parallel group it is rank 1 of 2" in second


def initialized(config: dict[str, Any]) -> tuple[bool, dict[str, Any]]:
    with configured():
        model = nn.Linear(4, 4)
        base = {"train_micro_batch_size_per_gpu": 1, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}}
        engine = deepspeed.initialize(model=model, config={**base, **config})[0]
        engine.destroy()
        return deepspeed.checkpointing.is_configured(), active()


@pytest.mark.parametrize(
    ("config", "on"),
    [
        ({}, None),
        ({"activation_checkpointing": {"partition_activations": False, "profile": "auto"}}, set()),
        ({"activation_checkpointing": {"profile": True, "number_checkpoints": 3}}, {"profile", "number_checkpoints"}),
        ({"activation_checkpointing.cpu_checkpointing": True}, {"cpu_checkpointing"}),
    ],
)
def test_initialize_configures_checkpointing_where_the_configuration_has_the_section(ranks, config, on):
    ((is_configured, settings),) = ranks(1, initialized, config)
    assert is_configured == (on is not None)
    assert {key for key, value in settings.items() if value} == (on or set())


def initialized_after_configure() -> dict[str, Any]:
    with configured(AllRanks(), partition_activations=True):
        deepspeed.initialize(model=nn.Linear(4, 4), config={"activation_checkpointing": {"partition_activations": True}})
        return {"mpu": checkpointing._PROCESS.active.mpu is not None, "store": checkpointing._PROCESS.active.store is not None}


def test_initialize_keeps_the_mpu_that_was_configured(ranks):
    assert ranks(2, initialized_after_configure) == [{"mpu": True, "store": True}] * 2


def initialized_with_a_mock() -> list[Any]:
    with mock.patch("deepspeed.checkpointing.configure") as configure:
        deepspeed.initialize(model=nn.Linear(4, 4), config={"activation_checkpointing": {"profile": True}})
    return [call.kwargs["deepspeed_config"].activation_checkpointing.profile for call in configure.call_args_list]


def test_configure_is_looked_up_on_the_module_when_it_is_called(ranks):
    assert ranks(1, initialized_with_a_mock) == [[True]]


def test_checkpoints_work_without_being_configured():
    with configured():
        x = torch.ones(2, requires_grad=True)
        deepspeed.checkpointing.checkpoint(torch.square, x).sum().backward()
        assert x.grad is not None and x.grad.tolist() == [2.0, 2.0]
        assert not deepspeed.checkpointing.is_configured()
