from __future__ import annotations

import contextlib
import logging
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepspeed.config import ConfigError, DeepSpeedConfig, load_config
from deepspeed.config.section import fields


def said(config: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(config)
    return str(caught.value)


def test_an_empty_configuration_trains_plainly():
    config = load_config({})
    assert (config.train_batch_size, config.zero_optimization.stage, config.gradient_clipping) == (1, 0, 0.0)
    assert (config.optimizer, config.scheduler, config.steps_per_print) == (None, None, None)
    assert not (config.fp16.enabled or config.bf16.enabled or config.wall_clock_breakdown)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"gradient_clipp1ng": 1.0}, "gradient_clipp1ng: unknown key; did you mean 'gradient_clipping'?"),
        ({"zero_optimisation": {"stage": 2}}, "zero_optimisation: unknown key; did you mean 'zero_optimization'?"),
        (
            {"zero_optimization": {"reduce_bucket_siz": 1}},
            "zero_optimization.reduce_bucket_siz: unknown key; did you mean 'reduce_bucket_size'?",
        ),
        (
            {"zero_optimization": {"offload_optimizer": {"devise": "cpu"}}},
            "zero_optimization.offload_optimizer.devise: unknown key; did you mean 'device'?",
        ),
        ({"fp16": {"opt_level": "O2"}}, "fp16.opt_level: unknown key; the keys of 'fp16' are enabled, auto_cast,"),
        ({"zero_optimization": {"loss_scale": 0}}, "(there is 'fp16.loss_scale')"),
        ({"zero_optimization.offload_optimizer.devise": "none"}, "zero_optimization.offload_optimizer.devise: unknown"),
        ({"optimizer": {"type": "Adam", "lr": 0.1}}, "optimizer.lr: unknown key"),
        (
            {"tensor_parallel": {"partition_config": {"layer_specs": [{"patern": []}]}}},
            "tensor_parallel.partition_config.layer_specs.0.patern: unknown key",
        ),
    ],
)
def test_an_unknown_key_is_named_with_its_whole_path_and_the_nearest_one(config, message):
    assert message in said(config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"fp16": {"enabled": "perhaps"}}, 'fp16.enabled: found "perhaps", expected true or false.'),
        ({"fp16": {"enabled": 2}}, "fp16.enabled: found 2, expected true or false."),
        ({"fp16": True}, 'fp16: found true, expected an object such as {"enabled": true}.'),
        ({"zero_optimization": 2}, "zero_optimization: found 2, expected an object."),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage: found 4, expected at most 3."),
        ({"zero_optimization": {"stage": "two"}}, 'zero_optimization.stage: found "two", expected a whole number.'),
        ({"zero_optimization": {"reduce_bucket_size": 1.5}}, "found 1.5, expected a whole number."),
        ({"zero_optimization": {"reduce_bucket_size": True}}, "found true, expected a whole number."),
        ({"zero_optimization": {"reduce_bucket_size": -1}}, "found -1, expected at least 0."),
        ({"zero_optimization": {"offload_optimizer": {"device": "gpu"}}}, "expected 'none', 'cpu' or 'nvme'."),
        ({"gradient_clipping": True}, "gradient_clipping: found true, expected a number."),
        ({"gradient_clipping": "much"}, 'gradient_clipping: found "much", expected a number.'),
        ({"gradient_clipping": float("nan")}, "gradient_clipping: found NaN, expected"),
        ({"gradient_clipping": float("inf")}, "gradient_clipping: found Infinity, expected a finite number"),
        ({"gradient_predivide_factor": 0}, "found 0, expected a number above 0"),
        ({"communication_data_type": "int8"}, "expected 'fp32', 'fp16' or 'bf16'."),
        ({"optimizer": {"params": {}}}, "optimizer.type: is missing."),
        ({"optimizer": {"type": 3}}, "optimizer.type: found 3, expected a string."),
        ({"optimizer": {"type": "Adam", "params": [1]}}, "optimizer.params: found [1], expected an object {...}."),
        ({"log_level": "loud"}, "expected 'debug', 'info', 'warning', 'error' or 'critical'."),
    ],
)
def test_a_value_of_the_wrong_type_says_what_was_found_and_expected(config, message):
    assert message in said(config)


def test_all_problems_are_told_at_once():
    message = said({"fp16": {"enabled": 2}, "gradient_clipp1ng": 1, "train_batch_size": 0, "bf16": {"enabld": 1}})
    assert message.startswith("4 problems in the configuration:")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, "fp16.enabled, bf16.enabled: both are true"),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "needs stage 1, 2 or 3; found stage 0"),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, "needs stage 3; found stage 2"),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}},
            "zero_optimization.offload_param.nvme_path: is missing",
        ),
    ],
)
def test_keys_that_contradict_each_other_are_both_named(config, message):
    assert message in said(config)


BATCH = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
ABSENT = ("optimizer.", "scheduler.", "datastates_ckpt.", "zero_optimization.zenflow.", "tensor_parallel.partition_config.")
"""Sections whose presence means something."""

KEYS = [(path, field) for path, field in fields(DeepSpeedConfig) if not path.startswith(ABSENT)]
NUMBERS = [(path, field) for path, field in KEYS if field.annotation in (int, float) and path not in BATCH]


def nested(path: str, value: object) -> dict[str, Any]:
    for name in reversed(path.split(".")):
        value = {name: value}
    return value  # type: ignore[return-value]


def value_at(config: Any, path: str) -> Any:
    for name in path.split("."):
        config = getattr(config, name)
    return config


@pytest.mark.parametrize(("path", "default"), [(path, field.default) for path, field in NUMBERS])
def test_every_number_may_be_a_string_or_a_float_but_no_truth_value(path, default):
    for form in (default, str(default), float(default)) if default < 2**53 else (default, str(default)):
        found = value_at(load_config(nested(path, form)), path)
        assert found == default
        assert type(found) is type(default)
    assert f"{path}: found true, expected a" in said(nested(path, True))


@given(size=st.integers(0, 10**12))
def test_a_size_in_scientific_notation_is_exact(size):
    config = load_config({"zero_optimization": {"reduce_bucket_size": f"{size}", "sub_group_size": f"{size:.15e}"}})
    assert config.zero_optimization.reduce_bucket_size == config.zero_optimization.sub_group_size == size


@pytest.mark.parametrize("value", ["bf16", "bfloat16", "torch.bfloat16", "BF16", torch.bfloat16])
def test_a_dtype_goes_by_all_its_names(value):
    assert load_config({"communication_data_type": value}).communication_data_type == "bf16"


def test_sizes_of_one_and_zero_occur():
    config = load_config({"zero_optimization": {"reduce_bucket_size": 1, "stage3_prefetch_bucket_size": 0}})
    assert config.zero_optimization.bucket_numel == 1


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [({}, 2**22), ({"reduce_bucket_size": 2e8}, 200_000_000), ({"reduce_bucket_size": 9, "allgather_bucket_size": 5}, 5)],
)
def test_the_smaller_bucket_size_holds(sizes, expected):
    assert load_config({"zero_optimization": sizes}).zero_optimization.bucket_numel == expected


@pytest.mark.parametrize("path", [path for path, _ in KEYS])
def test_auto_and_null_are_the_default_for_every_key(path):
    for value in ("auto", None):
        assert value_at(load_config(nested(path, value)), path) == value_at(load_config({}), path)


@pytest.mark.parametrize("section", list(DeepSpeedConfig.model_fields))
def test_auto_and_null_are_the_default_for_a_whole_section(section):
    for value in ("auto", None):
        assert load_config({section: value}).model_dump() == load_config({}).model_dump()


def test_auto_arguments_are_left_to_the_optimizer_but_the_schedules_rate_is_the_optimizers():
    config = load_config(
        {
            "optimizer": {"type": "AdamW", "params": {"lr": 3e-4, "betas": "auto", "weight_decay": "auto"}},
            "scheduler": {
                "type": "WarmupLR",
                "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": 7},
            },
        }
    )
    assert config.optimizer is not None and config.optimizer.params == {"lr": 3e-4}
    assert config.scheduler is not None and config.scheduler.params == {"warmup_max_lr": 3e-4, "warmup_num_steps": 7}
    assert str(config.origin("scheduler.params.warmup_max_lr")) == "auto: from optimizer.params.lr"
    assert str(config.origin("optimizer.params.betas")) == "auto: default"


def test_a_rate_that_is_auto_on_both_sides_is_the_schedules_default():
    config = load_config(
        {
            "optimizer": {"type": "Adam", "params": {"lr": "auto"}},
            "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": "auto"}},
        }
    )
    assert config.scheduler is not None and config.scheduler.params == {}


def test_a_key_with_dots_wins_over_the_section_that_it_names():
    config = load_config(
        {
            "zero_optimization": {"stage": 2, "reduce_bucket_size": 7},
            "zero_optimization.reduce_bucket_size": 2e8,
            "zero_optimization.offload_optimizer.device": "none",
        }
    )
    assert (config.zero_optimization.stage, config.zero_optimization.reduce_bucket_size) == (2, 200_000_000)
    assert "top-level key" in str(config.origin("zero_optimization.reduce_bucket_size"))


def test_an_unrelated_top_level_key_is_one_warning_and_an_editors_none(caplog):
    with caplog.at_level(logging.WARNING, "DeepSpeed"):
        load_config({"msamp": {"enabled": True}, "$schema": "ds.json", "loss_scale": 3})
    assert [record.getMessage() for record in caplog.records] == [
        "[Rank 0] the configuration key 'msamp' is not known and has no effect",
        "[Rank 0] the configuration key 'loss_scale' is not known and has no effect (there is 'fp16.loss_scale')",
    ]


def test_a_configuration_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        load_config({}).gradient_clipping = 3.0  # type: ignore[misc]


NAMES = sorted(
    {part for path, _ in fields(DeepSpeedConfig) for part in path.split(".")} | {"cpu_offload", "bfloat16", "nonsense"}
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["auto", "cpu", "1e3", "", "Adam", "ü"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=4),
    max_leaves=8,
)
DOTTED = st.lists(st.sampled_from(NAMES), min_size=1, max_size=3).map(".".join)


@settings(max_examples=300)
@given(config=st.dictionaries(st.sampled_from(list(DeepSpeedConfig.model_fields)) | DOTTED, VALUES, max_size=5))
def test_whatever_is_written_either_loads_or_is_an_error_of_the_configuration(config):
    with contextlib.suppress(ConfigError):
        assert isinstance(load_config(config), DeepSpeedConfig)


@given(text=st.text())
def test_any_text_is_a_configuration_or_an_error_of_one(text):
    with contextlib.suppress(ConfigError):
        load_config(text)
    with contextlib.suppress(ConfigError):
        load_config("{" + text)
