"""States on a disk: every combination trains to the same bits as without."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.parity import Training, assert_equal, generator, make_engine, train_engine

WIDTH = 12


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(WIDTH, 30), nn.Tanh(), nn.Linear(30, WIDTH)) for _ in range(3)])
        self.leave = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for block in self.blocks:
            x = x + block(x)
        return self.leave(x)


def inputs(index: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(4, WIDTH, generator=generator(index)).to(dtype)


def step(model: nn.Module, index: int, backward: Callable[..., object]) -> None:
    x = inputs(index, next(model.parameters()).dtype)
    backward(model(x).float().square().mean())


ADAM = {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.1}}
SGD = {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}}
MODES: dict[str, dict[str, Any]] = {
    "fp32": {"optimizer": ADAM},
    "sgd": {"optimizer": SGD},
    "bf16": {"optimizer": ADAM, "bf16": {"enabled": True}, "gradient_clipping": 0.5},
    # The first step overflows.
    "fp16": {"optimizer": ADAM, "fp16": {"enabled": True, "initial_scale_power": 18, "hysteresis": 1}},
}


def training(mode: str, accumulation: int = 1, **zero: object) -> Training:
    return Training(Blocks, step, steps=4, accumulation=accumulation, config={**MODES[mode], "zero_optimization": zero})


def on_disk(folder: Path, *sections: str, **more: object) -> dict[str, object]:
    """States of ``sections`` on a disk, in chunks of a few dozen elements."""
    sizes = {"offload_optimizer": {"buffer_size": 400}, "offload_param": {"max_in_cpu": 0}}
    return {section: {"device": "nvme", "nvme_path": str(folder), **sizes[section], **more} for section in sections}


def with_and_without(plain: Training, tiered: Training, stage: int) -> None:
    expected, actual = train_engine(plain, stage), train_engine(tiered, stage)
    assert_equal(actual.weights, expected.weights)
    assert str(actual.norms) == str(expected.norms)  # a skipped step has NaN


COMBINATIONS = [
    (1, ("offload_optimizer",)),
    (2, ("offload_optimizer",)),
    (3, ("offload_optimizer",)),
    (3, ("offload_param",)),
    (3, ("offload_optimizer", "offload_param")),
]


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("stage", "sections"), COMBINATIONS, ids=str)
def test_states_on_a_disk_train_to_the_same_bits(ranks, tmp_path, stage, sections, mode, size):
    for accumulation in (1, 4):
        tiered = training(mode, accumulation, **on_disk(tmp_path, *sections))
        ranks(size, with_and_without, training(mode, accumulation), tiered, stage)


OPTIONS = [{"pipeline": False}, {"pipeline_read": False}, {"ratio": 0.5}, {"buffer_count": 1}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options_of_the_stream_change_no_bit(ranks, tmp_path, options):
    tiered = training("bf16", **on_disk(tmp_path, "offload_optimizer", **options))
    ranks(2, with_and_without, training("bf16"), tiered, 2)


def bytes_in_memory(zero: dict[str, object], stage: int) -> dict[str, list[int]]:
    """Bytes of parameters, gradients, masters and optimizer states, after a backward and after a step."""
    engine = make_engine(training("bf16", **zero), stage)
    found = {}
    for index, moment in enumerate(("backward", "step")):
        step(engine, index, engine.backward)
        if moment == "step":
            engine.step()
        here = engine.model_state_bytes()
        found[moment] = [here.parameters, here.gradients, here.master, here.optimizer]
        engine.zero_grad()
    engine.destroy()
    return found


def test_what_lies_on_the_disk_takes_no_memory(ranks, tmp_path):
    everything = on_disk(tmp_path, "offload_optimizer", "offload_param")
    (found,) = ranks(1, bytes_in_memory, {"stage3_param_persistence_threshold": 0, **everything}, 3)
    assert found["backward"] == [0, 0, 0, 0] and found["step"][:3] == [0, 0, 0]
    step_numbers = found["step"][3]
    assert step_numbers < 100
    (below_stage_3,) = ranks(1, bytes_in_memory, on_disk(tmp_path, "offload_optimizer"), 2)
    assert below_stage_3["step"][0] > 0 and below_stage_3["step"][1:3] == [0, 0]
    (half,) = ranks(1, bytes_in_memory, on_disk(tmp_path, "offload_optimizer", ratio=0.5), 2)
    (whole,) = ranks(1, bytes_in_memory, {}, 2)
    assert 0.3 < half["step"][2] / whole["step"][2] < 0.7
