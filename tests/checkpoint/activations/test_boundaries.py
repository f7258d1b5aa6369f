from __future__ import annotations

import logging
import re

import pytest
import torch
from torch import nn

import deepspeed
from deepspeed.checkpoint.activations.boundaries import Boundaries
from tests.checkpoint.activations.support import configured


@pytest.fixture
def waits(monkeypatch) -> list[int]:
    """Grows at each wait for the device."""
    found: list[int] = []
    monkeypatch.setattr(deepspeed.get_accelerator(), "synchronize", lambda device_index=None: found.append(1), raising=True)
    return found


def test_both_ends_of_forward_and_backward_wait_for_the_device(waits):
    with configured(synchronize=True):
        x = torch.randn(3, 4, requires_grad=True)
        counts = []
        hidden = x * 1
        for _ in range(2):
            hidden = deepspeed.checkpointing.checkpoint(nn.Linear(4, 4), hidden)
            counts.append(len(waits))
        hidden.sum().backward()
    assert counts == [2, 4] and len(waits) == 8


def test_nothing_waits_unless_that_is_asked_for(waits):
    with configured():
        deepspeed.checkpointing.checkpoint(nn.Linear(4, 4), torch.randn(3, 4, requires_grad=True)).sum().backward()
    assert waits == []


def test_a_profile_logs_the_time_of_each_forward_and_backward(caplog, waits):
    with configured(profile=True), caplog.at_level(logging.INFO, "DeepSpeed"):
        hidden = torch.randn(3, 4, requires_grad=True)
        for _ in range(2):
            hidden = deepspeed.checkpointing.checkpoint(nn.Linear(4, 4), hidden)
        hidden.sum().backward()
    lines = [record.getMessage() for record in caplog.records]
    assert [re.sub(r"\d+\.\d\d", "T", line) for line in lines] == [
        f"[Rank 0] activation checkpoint: {part} T ms" for part in ("forward", "forward", "backward", "backward")
    ]


def test_the_backward_of_a_checkpoint_contains_its_recomputation(waits):
    counts = []

    def function(x: torch.Tensor) -> torch.Tensor:
        counts.append(len(waits))
        return x.sin()

    with configured(synchronize=True):
        deepspeed.checkpointing.checkpoint(function, torch.ones(3, requires_grad=True)).sum().backward()
    assert counts == [1, 3] and len(waits) == 4


def test_a_leaf_that_is_used_again_and_again_gathers_no_hooks(waits):
    leaf = torch.ones(3, requires_grad=True)
    with configured(synchronize=True):
        for _ in range(3):
            waits.clear()
            deepspeed.checkpointing.checkpoint(torch.sin, leaf).sum().backward()
            assert len(waits) == 4


def test_tensors_are_found_in_nested_inputs_and_outputs(waits):
    x = torch.ones(3, requires_grad=True)
    hidden = x * 1
    y = hidden.sin()
    Boundaries(synchronize=True).expect_backward(([{"inner": (hidden, 3)}],), {"result": [y, None]})
    y.sum().backward()
    assert len(waits) == 2


def test_a_backward_without_gradients_for_inputs_is_not_watched(waits):
    with configured(synchronize=True):
        deepspeed.checkpointing.checkpoint(nn.Linear(4, 4), torch.randn(3, 4)).sum().backward()
    assert len(waits) == 2
