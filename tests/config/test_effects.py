"""Keys whose effect is seen in the engine alone."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import deepspeed


def make_engine(stage: int = 0, lr: float = 0.1, **more: Any) -> deepspeed.DeepSpeedEngine:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(16, 33), nn.Tanh(), nn.Linear(33, 16))
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "optimizer": {"type": "SGD", "params": {"lr": lr, "momentum": 0.9}},
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 600},
        **more,
    }
    return deepspeed.initialize(model=model, config=config)[0]


def trained(stage: int, lr: float, more: dict[str, Any]) -> torch.Tensor:
    engine = make_engine(stage, lr, **more)
    rank, size = engine.communicator.rank, engine.communicator.size
    for index in range(3):
        x = torch.randn(4, 16, generator=torch.Generator().manual_seed(index * size + rank))
        engine.backward(engine(x).square().mean())
        engine.step()
    return torch.cat([parameter.detach().flatten() for parameter in engine.module.parameters()])


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize(
    "more", [{}, {"prescale_gradients": False}, {"prescale_gradients": True, "gradient_predivide_factor": 4.0}], ids=str
)
def test_summed_gradients_are_averaged_ones_times_the_ranks(ranks, stage, more):
    summed = ranks(2, trained, stage, 0.05, {"gradient_allreduce_op": "sum", **more})
    averaged = ranks(2, trained, stage, 0.1, {"gradient_allreduce_op": "avg"})
    torch.testing.assert_close(summed[0], averaged[0], rtol=1e-6, atol=1e-7)


def save_under_different_tags(directory: str, validation: str) -> tuple[str | None, list[str]]:
    """What was raised, and what was logged."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("DeepSpeed")
    logger.addHandler(handler)
    try:
        engine = make_engine(checkpoint={"tag_validation": validation})
        engine.save_checkpoint(directory, tag=f"from_rank_{engine.communicator.rank}")
    except ValueError as error:
        return str(error), messages
    finally:
        logger.removeHandler(handler)
    return None, messages


def test_different_tags_are_refused_on_every_rank_where_that_is_asked(ranks, tmp_path):
    for error, _ in ranks(2, save_under_different_tags, str(tmp_path), "FAIL"):
        assert error is not None and "'from_rank_0' on rank 0, 'from_rank_1' on rank 1" in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("validation", "warnings"), [("Warn", 1), ("ignore", 0)])
def test_different_tags_save_under_rank_0s_with_a_warning_where_that_is_asked(ranks, tmp_path, validation, warnings):
    for error, messages in ranks(2, save_under_different_tags, str(tmp_path), validation):
        assert error is None
        assert len([message for message in messages if "different tags" in message]) == warnings
    assert sorted(path.name for path in tmp_path.iterdir()) == ["from_rank_0", "latest", "zero_to_fp32.py"]


def initialize_from(directory: str) -> str:
    path = Path(directory) / f"rank_{torch.distributed.get_rank()}.json"
    with pytest.raises(ValueError) as caught:
        deepspeed.initialize(model=nn.Linear(2, 2), config=path)
    return f"{type(caught.value).__name__}: {caught.value}"


def test_a_configuration_that_one_rank_cannot_read_is_an_error_on_every_rank(ranks, tmp_path):
    (tmp_path / "rank_0.json").write_text("{}")
    (tmp_path / "rank_1.json").write_text('{"train_batch_size": }')
    first, second = ranks(2, initialize_from, str(tmp_path))
    assert first.startswith("ConfigError: reading the configuration failed on rank 1")
    assert "rank_1.json, line 1, column 22: this is not JSON" in first and "this is not JSON" in second


def autocast_scale(dtype: str) -> float:
    engine = make_engine(torch_autocast={"enabled": True, "dtype": dtype}, fp16={"initial_scale_power": 7})
    return engine.optimizer.loss_scale


@pytest.mark.parametrize(("dtype", "scale"), [("float16", 128.0), ("bfloat16", 1.0)])
def test_the_loss_of_fp16_autocast_is_scaled_as_the_fp16_section_says(ranks, dtype, scale):
    assert ranks(1, autocast_scale, dtype) == [scale]


def unknown_argument(section: str) -> str:
    kind = {"optimizer": "AdamW", "scheduler": "WarmupLR"}[section]
    config = {"optimizer": {"type": "SGD", "params": {"lr": 0.1}}, section: {"type": kind, "params": {"weight_decai": 1}}}
    with pytest.raises(ValueError) as caught:
        deepspeed.initialize(model=nn.Linear(2, 2), config=config)
    return str(caught.value)


def test_an_unknown_argument_of_the_optimizer_or_schedule_is_named(ranks):
    assert "optimizer.params.weight_decai is not an argument of AdamW. Did you mean 'weight_decay'?" in str(
        ranks(2, unknown_argument, "optimizer")
    )
    assert "scheduler.params.weight_decai is not an argument of WarmupLR" in str(ranks(2, unknown_argument, "scheduler"))
