"""What these tests share: the stages, tiny models, and a process that no earlier test has configured."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

import deepspeed

STAGES = (0, 1, 2, 3)
"""The ZeRO stages that every integration is tested at."""

WORLDS = (1, 2)
"""The numbers of ranks."""

VOCABULARY, LENGTH = 64, 12

each_stage = pytest.mark.parametrize("stage", STAGES)
each_stage_and_world = pytest.mark.parametrize(("stage", "world"), [(s, w) for s in STAGES for w in WORLDS])


@contextmanager
def unconfigured() -> Iterator[None]:
    """Accelerate and Transformers keep their configuration in variables of the environment and of their classes: leave
    both as they were found, for the next test in this process."""
    before = dict(os.environ)
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="29500")
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        unset_hf_deepspeed_config()


def isolated(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` run in ``unconfigured``: for functions that run on the ranks of the pool."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with unconfigured():
            return function(*args, **kwargs)

    return wrapper


class Texts(Dataset[dict[str, Tensor]]):
    """``size`` sequences of random tokens."""

    def __init__(self, size: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.tokens = torch.randint(2, VOCABULARY, (size, LENGTH), generator=generator)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


def language_model(seed: int = 3) -> nn.Module:
    """GPT-2 of 2 layers with tied embeddings, the same for the same seed."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": VOCABULARY, "n_positions": 2 * LENGTH, "n_embd": 16, "n_layer": 2, "n_head": 2}
    without_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(**sizes, **without_dropout, bos_token_id=0, eos_token_id=1))


def weights(model: nn.Module) -> dict[str, Tensor]:
    """The model's state dict, whole. Called on all ranks."""
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_same(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float = 0.0) -> None:
    """Every tensor within ``tolerance`` (relative, by its 2-norm) of the expected one; 0 for the same bits."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        difference = (actual[name].double() - value.double()).norm() / value.double().norm().clamp(min=1e-12)
        assert difference <= tolerance, f"{name} differs by {difference:.1e} of its norm"
