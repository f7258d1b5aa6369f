"""Which of a model's states lie on a tier below memory."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from .. import native
from ..accelerator import get_accelerator
from ..memory.heap import give_back_holes
from ..memory.layout import Bucket
from ..memory.tiers import Evictable, FileTier

if TYPE_CHECKING:
    from ..config import DeepSpeedConfig
    from ..config.offload import OffloadOptimizerConfig, OffloadParamConfig

BEHIND = 2
"""Gradients of so many slices may be on their way to the file while the next is reduced."""


@dataclass
class Allowance:
    """How many elements stay in memory: all until ``numel`` do, or the part ``share`` of them as they come."""

    numel: int = 0
    share: float = 0.0
    _seen: int = 0
    _stayed: int = 0

    def stays(self, numel: int) -> bool:
        """Whether the next ``numel`` elements stay."""
        self._seen += numel
        stays = self._stayed + numel <= max(self.numel, self.share * self._seen)
        self._stayed += numel if stays else 0
        return stays


@dataclass(frozen=True)
class Tiers:
    """The tier of ``parameters`` (the slices of units) and of ``states`` (masters, the optimizer's, and gradients that are
    sharded); None is memory. ``ahead`` and ``behind``: whether the step reads and writes while it computes. While nobody does,
    the optimizer's states are 8-bit numbers with ``quantized_states``, and with ``split_masters`` those of bf16 parameters are
    the low halves of their bits."""

    parameters: FileTier | None = None
    states: FileTier | None = None
    parameters_in_memory: Allowance = field(default_factory=Allowance)
    states_in_memory: Allowance = field(default_factory=Allowance)
    ahead: bool = True
    behind: bool = True
    quantized_states: bool = False
    split_masters: bool = False

    def asked_in_advance(self) -> Tiers:
        """The same, to be asked what these will answer later."""
        copies = {name: replace(getattr(self, name)) for name in ("parameters_in_memory", "states_in_memory")}
        return replace(self, **copies)

    def of_parameters(self, bucket: Bucket) -> FileTier | None:
        """The tier of the slice of ``bucket``. Asked once."""
        if self.parameters is None or bucket.unit is None or self.parameters_in_memory.stays(bucket.slice_numel):
            return None
        return self.parameters

    def of_states(self, bucket: Bucket) -> FileTier | None:
        """The tier of the states of ``bucket``. Asked once."""
        return None if self.states is None or self.states_in_memory.stays(bucket.slice_numel) else self.states


IN_MEMORY = Tiers()
"""No state lies anywhere else."""


def open_tiers(config: DeepSpeedConfig) -> Tiers:
    """The files of the states that are to lie in files: what an engine keeps for itself has one of its own, which goes with
    the engine. OSError where one cannot be made."""
    parameters, states = config.zero_optimization.offload_param, config.zero_optimization.offload_optimizer
    # Imported here: who shards models without files does not pay for pydantic.
    from ..memory.files import queue_options

    def file(offload: OffloadParamConfig | OffloadOptimizerConfig) -> FileTier | None:
        on_disk = offload.device == "nvme" and offload.nvme_path is not None
        return FileTier(Path(offload.nvme_path or ""), queue_options(config.aio)) if on_disk else None

    return Tiers(
        parameters=file(parameters),
        states=file(states),
        parameters_in_memory=Allowance(numel=parameters.max_in_cpu),
        states_in_memory=Allowance(share=1 - states.ratio),
        ahead=states.reads_ahead,
        behind=states.writes_behind,
        quantized_states=config.data_types.optimizer_state_bits == 8,
        split_masters=config.data_types.split_master,
    )


def refuse_other_devices(config: DeepSpeedConfig) -> None:
    """Raise ValueError where states are to move from an accelerator: so far they do from the CPU's memory alone, where
    device cpu is what is so anyway."""
    zero, here = config.zero_optimization, get_accelerator().kind
    if here != "cpu" and (zero.offloads_optimizer or zero.offloads_parameters):
        raise ValueError(
            f"zero_optimization.offload_optimizer and offload_param move states out of the CPU's memory; from {here} is not "
            "built yet: set their device to none, or DS_ACCELERATOR=cpu"
        )


class GradientTier:
    """Reduced gradients on ``file``, each from its reduction on until it is added to, or the step. Their norms are taken on
    the way: nobody has to read them for that."""

    def __init__(self, file: FileTier):
        self._file = file
        self._leaving: deque[Evictable] = deque()
        self._norms: dict[Evictable, tuple[float, bool]] = {}

    def evictable(self, kept: Tensor) -> Evictable:
        """The memory of ``kept``."""
        return self._file.evictable(kept)

    def bring(self, kept: Tensor, *, values: bool) -> None:
        """Have memory for ``kept``, with its values or to be overwritten."""
        evictable = self._file.evictable(kept)
        evictable.fetch() if values else evictable.claim()
        self._norms.pop(evictable, None)

    def send(self, kept: Tensor) -> None:
        """Begin to write ``kept``, whose memory is then free."""
        evictable = self._file.evictable(kept)
        self._norms[evictable] = native.squared_norm(kept)
        evictable.start_evict()
        self._leaving.append(evictable)
        while len(self._leaving) > BEHIND:
            self._leaving.popleft().evict()

    def changed(self, kept: Tensor) -> None:
        """The norm of ``kept`` is another one now."""
        self._norms.pop(self._file.evictable(kept), None)

    def settle(self) -> None:
        """Have all written that is on its way: backward has ended."""
        while self._leaving:
            self._leaving.popleft().evict()
        give_back_holes()

    def squared_norm(self, kept: Tensor) -> tuple[float, bool]:
        """What ``native.squared_norm`` says of ``kept``."""
        evictable = self._file.evictable(kept)
        if evictable not in self._norms:
            evictable.fetch()
            self._norms[evictable] = native.squared_norm(kept)
            evictable.drop()
        return self._norms[evictable]


def in_memory(bucket: Bucket) -> GradientTier | None:
    """The gradient of ``bucket`` lies on no tier."""
    return None
