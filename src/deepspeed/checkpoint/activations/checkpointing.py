"""``deepspeed.checkpointing``: run a function without keeping what its backward needs, and recompute that in backward.

The recomputation is ``torch.utils.checkpoint``'s, without re-entrant backward: gradients have the bits that they have
without checkpoints, in nested checkpoints too, and arguments need no gradient. Added to it are where inputs wait for
backward (``inputs.py``), the named random states (``random_states.py``) and what is done at a checkpoint's boundaries
(``boundaries.py``). The documented functions take no object along, so what ``configure`` sets is the process's, and it is
kept in one place here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils.checkpoint
from pydantic import ValidationError
from torch import Tensor

from ...config import DeepSpeedConfig, load_config
from ...config.batch import BATCH_KEYS
from ...config.checkpointing import ActivationCheckpointingConfig
from ...config.errors import raise_problems
from ...config.plain import validation_problems
from ...config.source import read_source
from .boundaries import Boundaries
from .buffers import InputBuffers
from .inputs import InputStore
from .model_parallel import ModelParallelUnit, check_model_parallel, model_parallel_communicator
from .random_states import CudaRNGStatesTracker, RecordedStates, get_cuda_rng_tracker, seed_model_parallel

__all__ = [
    "CheckpointFunction",
    "CudaRNGStatesTracker",
    "checkpoint",
    "configure",
    "get_cuda_rng_tracker",
    "is_configured",
    "model_parallel_cuda_manual_seed",
    "non_reentrant_checkpoint",
    "partition_activations_in_checkpoint",
    "reset",
    "set_num_layers",
]


@dataclass(frozen=True)
class _Active:
    """What checkpoints go by. Without a ``store`` inputs stay where they are."""

    settings: ActivationCheckpointingConfig = field(default_factory=ActivationCheckpointingConfig)
    mpu: ModelParallelUnit | None = None
    store: InputStore | None = None
    boundaries: Boundaries = field(default_factory=Boundaries)
    configured: bool = False


class _Process:
    """Holds the active settings of this process."""

    def __init__(self) -> None:
        self.active = _Active()


_PROCESS = _Process()
_WITHIN: ContextVar[bool] = ContextVar("within a checkpoint", default=False)


def configure(
    mpu_: ModelParallelUnit | None,
    deepspeed_config: DeepSpeedConfig | str | os.PathLike[str] | Mapping[str, Any] | None = None,
    partition_activations: bool | None = None,
    contiguous_checkpointing: bool | None = None,
    num_checkpoints: int | None = None,
    checkpoint_in_cpu: bool | None = None,
    synchronize: bool | None = None,
    profile: bool | None = None,
) -> None:
    """Set how checkpoints of this process keep their inputs. What is None is as ``deepspeed_config`` says where there is
    one, else as it was (at first: off). ``deepspeed.initialize`` calls this with a configuration that has the section
    ``activation_checkpointing``.

    ``mpu_`` has ``get_model_parallel_rank``, ``_group`` and ``_world_size``: ranks that compute with the same activations.

    - ``partition_activations``: split inputs over these ranks, and gather them in backward.
    - ``contiguous_checkpointing``: keep inputs in buffers made once, for ``num_checkpoints`` checkpoints whose inputs
      are of one size; with ``partition_activations`` alone.
    - ``checkpoint_in_cpu``: keep inputs in CPU memory. On the CPU they are there, and nothing is copied.
    - ``synchronize``: wait for the device at each end of a checkpoint's forward and backward; ``profile``: log the times.

    Raises ConfigError for settings that contradict each other, TypeError for another object as ``mpu_``.
    """
    active = _PROCESS.active
    section = active.settings if deepspeed_config is None else _section(deepspeed_config)
    mpu = active.mpu if mpu_ is None else check_model_parallel(mpu_)
    given = {
        "partition_activations": partition_activations,
        "contiguous_memory_optimization": contiguous_checkpointing,
        "number_checkpoints": num_checkpoints,
        "cpu_checkpointing": checkpoint_in_cpu,
        "synchronize_checkpoint_boundary": synchronize,
        "profile": profile,
    }
    _activate(section, {name: value for name, value in given.items() if value is not None}, mpu, configured=True)


def is_configured() -> bool:
    """Whether ``configure`` has been called in this process, by ``deepspeed.initialize`` or otherwise. Checkpoints work
    without it too."""
    return _PROCESS.active.configured


def partition_activations_in_checkpoint(partition_activation: bool) -> None:
    """Set ``partition_activations`` alone."""
    _change(partition_activations=partition_activation)


def set_num_layers(nlayers: int) -> None:
    """Set the number of checkpoints of a forward alone: ``num_checkpoints`` of ``configure``."""
    _change(number_checkpoints=nlayers)


def reset() -> None:
    """Free the buffers of ``contiguous_checkpointing``: to be called after forwards that have no backward. Graphs that
    still need what is in them keep it."""
    if _PROCESS.active.store is not None:
        _PROCESS.active.store.release_buffers()


def model_parallel_cuda_manual_seed(seed: int) -> None:
    """Seed the device's default random state with ``seed``, and the tracker's "model-parallel-rng" with ``seed`` + 2718 +
    model-parallel rank (that of ``configure``'s ``mpu_``; 0 without one). Other states of the tracker are forgotten.

    Ranks of one model-parallel group give the same seed. It takes the place of ``torch.cuda.manual_seed``.
    """
    mpu = _PROCESS.active.mpu
    seed_model_parallel(seed, rank=0 if mpu is None else mpu.get_model_parallel_rank())


def checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """``function(*args, **kwargs)``, of which only the inputs are kept: backward calls the function once more for the rest.

    It sees the random states, autocast and inputs of the first call, so it must do the same again. Arguments and results
    are of any kind. Inputs are kept as ``configure`` says where they are arguments themselves, not within a list, and
    require a gradient; parameters stay where they are. A checkpoint within another keeps nothing until backward reaches
    the outer one.
    """
    if not callable(function):
        raise TypeError(
            "deepspeed.checkpointing.checkpoint takes a function and its arguments, checkpoint(block, x); found "
            f"{type(function).__name__} in place of the function"
        )
    boundaries = _PROCESS.active.boundaries
    with boundaries.forward():
        outputs = _checkpointed(function, args, kwargs) if torch.is_grad_enabled() else function(*args, **kwargs)
    boundaries.expect_backward((args, kwargs), outputs)
    return outputs


non_reentrant_checkpoint = checkpoint
"""The name by which one asks for what ``checkpoint`` does anyway."""


class CheckpointFunction:
    """:func:`checkpoint` in the form of an autograd function. It is none: autograd runs the operations of the function."""

    @staticmethod
    def apply(run_function: Callable[..., Any], all_outputs: list[Any], *args: Any) -> Any:
        """``checkpoint(run_function, *args)``: its results are appended to ``all_outputs``, its tensors are returned (one
        as it is, several as a tuple)."""
        outputs = checkpoint(run_function, *args)
        if isinstance(outputs, Tensor):
            all_outputs.append(outputs)
            return outputs
        all_outputs.extend(outputs)
        return tuple(output for output in outputs if isinstance(output, Tensor))


def _checkpointed(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    # torch saves positional tensors alone. The function below must not hold the arguments: they would stay whole.
    count, names = len(args), tuple(kwargs)

    def run(*values: Any) -> Any:
        with _within_checkpoint():
            return function(*values[:count], **dict(zip(names, values[count:], strict=True)))

    # Within another checkpoint inputs are recomputed like everything else, and live for the outer backward alone.
    store = None if _WITHIN.get() else _PROCESS.active.store
    with nullcontext() if store is None else store.hooks():
        return torch.utils.checkpoint.checkpoint(
            run, *args, *kwargs.values(), use_reentrant=False, context_fn=_forward_and_recomputation
        )


@contextmanager
def _within_checkpoint() -> Iterator[None]:
    token = _WITHIN.set(True)
    try:
        yield
    finally:
        _WITHIN.reset(token)


def _forward_and_recomputation() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """The contexts of the first call and of the second, which draws the numbers of the first from the tracker."""
    return nullcontext(), RecordedStates(get_cuda_rng_tracker())


def _section(config: DeepSpeedConfig | str | os.PathLike[str] | Mapping[str, Any]) -> ActivationCheckpointingConfig:
    if isinstance(config, DeepSpeedConfig):
        return config.activation_checkpointing
    # Batch sizes are solved for a number of data-parallel ranks, which is not this module's business.
    values, _ = read_source(config)
    return load_config({key: value for key, value in values.items() if key not in BATCH_KEYS}).activation_checkpointing


def _change(**given: Any) -> None:
    active = _PROCESS.active
    _activate(active.settings, given, active.mpu, configured=active.configured)


def _activate(
    section: ActivationCheckpointingConfig, given: Mapping[str, Any], mpu: ModelParallelUnit | None, *, configured: bool
) -> None:
    """Make ``section`` with the values ``given`` the settings of this process."""
    settings = _changed(section, given)
    communicator = model_parallel_communicator(mpu) if settings.partition_activations else None
    buffers = InputBuffers(settings.number_checkpoints or 0) if settings.contiguous_memory_optimization else None
    moved = communicator is not None or buffers is not None or settings.cpu_checkpointing
    store = InputStore(communicator=communicator, on_cpu=settings.cpu_checkpointing, buffers=buffers) if moved else None
    boundaries = Boundaries(synchronize=settings.synchronize_checkpoint_boundary, profile=settings.profile)
    _PROCESS.active = _Active(settings, mpu, store, boundaries, configured)


def _changed(section: ActivationCheckpointingConfig, given: Mapping[str, Any]) -> ActivationCheckpointingConfig:
    origin = "the settings of deepspeed.checkpointing"
    try:
        settings = ActivationCheckpointingConfig(**{**section.model_dump(), **given})
    except ValidationError as error:
        raise_problems(validation_problems(error), origin)
        raise
    raise_problems(settings.contradictions(), origin)
    return settings
