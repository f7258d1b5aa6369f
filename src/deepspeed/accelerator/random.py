"""Where random numbers on this process's device come from."""

from __future__ import annotations

import torch

from .accelerator import get_accelerator


def device_generator() -> torch.Generator:
    """The generator from which operations on this process's device draw where they are given none."""
    accelerator = get_accelerator()
    if accelerator.kind == "cpu":
        return torch.default_generator
    torch.cuda.init()
    return torch.cuda.default_generators[accelerator.current_device()]
