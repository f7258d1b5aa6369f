"""What each rank has for itself: its random states, and how far it is in the engine's own training data."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..accelerator import get_accelerator
from ..accelerator.random import device_generator
from ..checkpoint.activations.random_states import get_cuda_rng_tracker
from ..checkpoint.source import Source
from ..comm.communicator import Communicator
from .loader import RepeatingLoader

if TYPE_CHECKING:
    from .information import EngineInformation


def rank_states(engine: EngineInformation) -> dict[str, Any]:
    """The states of this rank, as values that a checkpoint holds."""
    return {"random": random_states(), "data": None if engine._batches is None else engine._batches.position()}


@dataclass(frozen=True)
class Resumption:
    """What this rank goes on with: a place in the data, and random states, None where they belong to other ranks."""

    data: dict[str, int] | None
    random: dict[str, Any] | None


def resumption(source: Source, communicator: Communicator) -> Resumption:
    """What the checkpoint has for this rank. All ranks were at one place in the data; random states are each rank's own, and
    those of another number of ranks are nobody's. Other programs' checkpoints have neither."""
    same = source.index["ranks"] == communicator.size
    states = source.rank_states(communicator.rank if same else 0)
    return Resumption(states.get("data"), states.get("random") if same else None)


def resume(engine: EngineInformation, saved: Resumption) -> None:
    """Go on in the data where all ranks together were, and draw the random numbers that would have come next."""
    if saved.data is not None and engine.training_dataloader is not None:
        if engine._batches is None:
            engine._batches = RepeatingLoader(engine.training_dataloader)
        engine._batches.go_to(**saved.data)
    if saved.random is not None:
        set_random_states(saved.random)


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
