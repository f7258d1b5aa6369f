from __future__ import annotations

from collections import namedtuple

import torch
from torch import nn

from deepspeed import OnDevice
from deepspeed.runtime.utils import move_to_device


def test_a_model_is_made_on_meta_in_the_dtype_asked_for():
    with OnDevice(dtype=torch.bfloat16, device="meta"):
        layer = nn.Linear(10, 10)
    assert layer.weight.is_meta and layer.weight.dtype == torch.bfloat16
    assert torch.ones(1).dtype == torch.float32 and not torch.ones(1).is_meta


def test_it_is_undone_by_an_error_and_does_nothing_when_disabled():
    try:
        with OnDevice(dtype=torch.float16):
            raise KeyError("within")
    except KeyError:
        pass
    assert torch.ones(1).dtype == torch.float32
    with OnDevice(dtype=torch.float16, enabled=False):
        assert torch.ones(1).dtype == torch.float32 and not torch.ones(1).is_meta


Pair = namedtuple("Pair", ["left", "right"])


def test_every_tensor_of_a_nest_moves():
    batch = {"x": [torch.ones(2), 3], "pair": Pair(torch.ones(1), (torch.zeros(1), "text"))}
    moved = move_to_device(batch, "meta")
    assert moved["x"][0].is_meta and moved["x"][1] == 3
    assert isinstance(moved["pair"], Pair) and moved["pair"].left.is_meta
    assert moved["pair"].right[0].is_meta and moved["pair"].right[1] == "text"
    assert not batch["x"][0].is_meta
