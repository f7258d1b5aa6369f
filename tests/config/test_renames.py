from __future__ import annotations

import logging
from typing import Any

import pytest

from deepspeed.config import ConfigError
from deepspeed.config.prepare import prepare
from deepspeed.config.renames import RENAMES


def prepared(config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str], list[str]]:
    sources, problems = prepare(config)
    return config, {path: str(origin) for path, origin in sources.items()}, [str(problem) for problem in problems]


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ({"zero_optimization": True}, {"zero_optimization": {"stage": 1}}),
        ({"zero_optimization": False}, {"zero_optimization": {"stage": 0}}),
        (
            {"zero_optimization": True, "allgather_size": 5e8},
            {"zero_optimization": {"stage": 1, "allgather_bucket_size": 5e8}},
        ),
        (
            {"zero_optimization": {"cpu_offload": True}},
            {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
        ),
        (
            {"zero_optimization": {"cpu_offload": False, "cpu_offload_params": True}},
            {"zero_optimization": {"offload_optimizer": {"device": "none"}, "offload_param": {"device": "cpu"}}},
        ),
        (
            {"zero_optimization": {"cpu_offload_use_pin_memory": True}},
            {"zero_optimization": {"offload_optimizer": {"pin_memory": True}, "offload_param": {"pin_memory": True}}},
        ),
        (
            {"zero_optimization": {"stage3_gather_fp16_weights_on_model_save": True}},
            {"zero_optimization": {"stage3_gather_16bit_weights_on_model_save": True}},
        ),
        (
            {"zero_optimization": {"gather_16bit_weights_on_model_save": True}},
            {"zero_optimization": {"stage3_gather_16bit_weights_on_model_save": True}},
        ),
        ({"bfloat16": {"enabled": True}}, {"bf16": {"enabled": True}}),
        ({"fp32_allreduce": True}, {"communication_data_type": "fp32"}),
        ({"fp32_allreduce": False}, {}),
        ({"zero_optimization": {"aio": {"queue_depth": 9}}}, {"zero_optimization": {}, "aio": {"queue_depth": 9}}),
        ({"aio": {"intra_op_parallelism": 4}}, {"aio": {"thread_count": 4}}),
        ({"zero_optimization": {"offload_param": False}}, {"zero_optimization": {"offload_param": {"device": "none"}}}),
    ],
)
def test_another_name_is_the_key_that_it_means(given, meant):
    values, _, problems = prepared(given)
    assert values == meant
    assert not problems


@pytest.mark.parametrize("rename", [rename for rename in RENAMES if rename.deprecated], ids=lambda rename: rename.old)
def test_a_deprecated_name_is_one_warning_that_names_the_new_one(rename, caplog):
    value: Any = {"enabled": False} if rename.old == "bfloat16" else True
    for name in reversed(rename.old.split(".")):
        value = {name: value}
    with caplog.at_level(logging.WARNING, "DeepSpeed"):
        _, sources, _ = prepared(value)
    assert len(caplog.records) == 1
    message = caplog.records[0].getMessage()
    assert f"'{rename.old}' is deprecated" in message and all(f"'{new}'" in message for new in rename.new)
    assert f"given as {rename.old} (deprecated)" in sources.values()


def test_other_good_names_are_no_warning(caplog):
    with caplog.at_level(logging.WARNING, "DeepSpeed"):
        prepared({"zero_optimization": {"param_persistence_threshold": 10}, "aio": {"intra_op_parallelism": 2}})
    assert not caplog.records


@pytest.mark.parametrize(
    "config",
    [
        {"bfloat16": {"enabled": True}, "bf16": {"enabled": False}},
        {"zero_optimization": {"cpu_offload": True, "offload_optimizer": {"device": "nvme"}}},
        {"zero_optimization": {"cpu_offload": True, "offload_optimizer": False}},
        {"zero_optimization": {"allgather_bucket_size": 7}, "allgather_size": 8},
        {"communication_data_type": "bf16", "fp32_allreduce": True},
        {"aio": {"queue_depth": 4}, "zero_optimization": {"aio": {"queue_depth": 5}}},
    ],
)
def test_two_names_of_a_key_with_different_values_are_an_error(config):
    *_, problems = prepared(config)
    assert len(problems) == 1
    assert "but also" in problems[0] and "Keep one of them" in problems[0]


@pytest.mark.parametrize(
    "config",
    [
        {"bfloat16": {"enabled": True}, "bf16": {"enabled": True}},
        {"zero_optimization": {"allgather_bucket_size": "5e8"}, "allgather_size": 500_000_000},
        {"zero_optimization": {"allgather_bucket_size": 8}, "allgather_size": "auto"},
    ],
)
def test_two_names_of_a_key_with_the_same_value_are_fine(config):
    *_, problems = prepared(config)
    assert not problems


def test_a_name_fills_in_for_a_key_that_is_auto():
    values, sources, _ = prepared({"bf16": {"enabled": "auto"}, "bfloat16": {"enabled": True}})
    assert values == {"bf16": {"enabled": True}}
    assert sources == {"bf16.enabled": "given as bfloat16 (deprecated)"}


def test_a_wrong_value_under_another_name_is_told_by_the_key_that_it_means():
    from deepspeed.config import load_config

    with pytest.raises(ConfigError, match=r"offload_optimizer.device: found 3"):
        load_config({"zero_optimization": {"cpu_offload": 3}})
