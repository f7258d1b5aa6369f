"""What each rank has for itself: its random states, and how far it is in the engine's own training data."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..accelerator import get_accelerator
from ..accelerator.random import device_generator
from ..checkpoint.activations.random_states import get_cuda_rng_tracker
from .loader import RepeatingLoader

if TYPE_CHECKING:
    from .information import EngineInformation


def rank_states(engine: EngineInformation) -> dict[str, Any]:
    """The states of this rank, as values that a checkpoint holds."""
    return {"random": random_states(), "data": None if engine._batches is None else engine._batches.position()}


def restore_rank_states(engine: EngineInformation, saved: dict[str, Any], *, same_ranks: bool) -> None:
    """Go on in the data where all ranks together were. Draw the random numbers that would have come next where there are
    as many ranks as there were: others have none of their own to go on with."""
    if saved["data"] is not None and engine.training_dataloader is not None:
        if engine._batches is None:
            engine._batches = RepeatingLoader(engine.training_dataloader)
        engine._batches.go_to(**saved["data"])
    if same_ranks:
        set_random_states(saved["random"])


def random_states() -> dict[str, Any]:
    """The states of Python's, NumPy's and torch's generators: the CPU's, the device's and the named ones."""
    version, words, spare = random.getstate()
    kind, keys, position, has_spare, numpy_spare = np.random.get_state(legacy=True)
    return {
        "python": [version, torch.tensor(words), spare],
        "numpy": [kind, torch.from_numpy(np.asarray(keys, dtype=np.int64)), position, has_spare, numpy_spare],
        "torch": torch.get_rng_state(),
        "device": device_generator().get_state() if get_accelerator().kind != "cpu" else None,
        "named": get_cuda_rng_tracker().get_states(),
    }


def set_random_states(states: dict[str, Any]) -> None:
    """Have the generators go on from what ``random_states`` returned."""
    version, words, spare = states["python"]
    random.setstate((version, tuple(words.tolist()), spare))
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if states["device"] is not None and get_accelerator().kind != "cpu":
        device_generator().set_state(states["device"])
    get_cuda_rng_tracker().set_states(states["named"])
