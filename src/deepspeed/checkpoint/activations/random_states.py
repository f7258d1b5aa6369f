"""Random states by name: model-parallel ranks draw different numbers where each holds a part of a tensor (dropout within
a split layer), and the same numbers where each holds the whole.

A state is what a generator of this process's device (CUDA's or the CPU's) goes on from, as a tensor of bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache

from torch import Tensor

from ...accelerator.random import device_generator

MODEL_PARALLEL = "model-parallel-rng"
"""The state in which model-parallel ranks differ."""

MODEL_PARALLEL_OFFSET = 2718
"""What is added to a seed for the first model-parallel rank, so that its numbers are not those of the default state."""


class CudaRNGStatesTracker:
    """Named random states beside the default one of the device, CUDA or CPU.

    ``add`` starts a state from a seed; within ``fork`` the device draws from it, and goes on where it stood afterwards.
    """

    def __init__(self) -> None:
        self._states: dict[str, Tensor] = {}
        self._seeds: set[int] = set()

    def reset(self) -> None:
        """Forget all states."""
        self._states = {}
        self._seeds = set()

    def get_states(self) -> dict[str, Tensor]:
        """The states by name, in a dictionary of its own: what is drawn later does not change it."""
        return dict(self._states)

    def set_states(self, states: Mapping[str, Tensor]) -> None:
        """Go on from ``states``, which ``get_states`` returned."""
        self._states = dict(states)

    def add(self, name: str, seed: int) -> None:
        """Start a state called ``name`` from ``seed``. Raises ValueError where the name or the seed is taken: two
        states of one seed would draw the same numbers."""
        if seed in self._seeds:
            raise ValueError(f"the random state {name!r} cannot start from seed {seed}: another state does; take another seed")
        if name in self._states:
            raise ValueError(f"there is a random state {name!r} already; call reset() to start all anew")
        generator = device_generator()
        before = generator.get_state()
        generator.manual_seed(seed)
        self._states[name] = generator.get_state()
        self._seeds.add(seed)
        generator.set_state(before)

    @contextmanager
    def fork(self, name: str = MODEL_PARALLEL) -> Iterator[None]:
        """Draw from the state called ``name`` within this context. Raises ValueError where there is none."""
        if name not in self._states:
            known = ", ".join(repr(other) for other in self._states) or "none"
            raise ValueError(
                f"there is no random state {name!r} (known: {known}): add it, or call "
                "deepspeed.checkpointing.model_parallel_cuda_manual_seed(seed) first"
            )
        generator = device_generator()
        before = generator.get_state()
        generator.set_state(self._states[name])
        try:
            yield
        finally:
            self._states[name] = generator.get_state()
            generator.set_state(before)


class RecordedStates:
    """The states of a tracker as they are now. A context that draws from them once more, each time it is entered, and goes
    on where the tracker stood afterwards."""

    def __init__(self, tracker: CudaRNGStatesTracker):
        self._tracker = tracker
        self._recorded = tracker.get_states()
        self._interrupted: dict[str, Tensor] = {}

    def __enter__(self) -> None:
        self._interrupted = self._tracker.get_states()
        self._tracker.set_states(self._recorded)

    def __exit__(self, *exception: object) -> None:
        self._tracker.set_states(self._interrupted)


@cache
def get_cuda_rng_tracker() -> CudaRNGStatesTracker:
    """The tracker of this process. What its states draw in a checkpoint is drawn again when that is recomputed."""
    return CudaRNGStatesTracker()


def seed_model_parallel(seed: int, *, rank: int) -> None:
    """Start the default state from ``seed``, and the tracker's only one, ``MODEL_PARALLEL``, from a seed of model-parallel
    rank ``rank``'s own."""
    tracker = get_cuda_rng_tracker()
    tracker.reset()
    device_generator().manual_seed(seed)
    tracker.add(MODEL_PARALLEL, seed + MODEL_PARALLEL_OFFSET + rank)
