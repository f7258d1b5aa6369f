"""What a training step needs in memory and on a disk, on each rank: arithmetic over a layout and a traced step.

The nouns:

- *states*: parameters, gradients, masters and optimizer states, while nobody computes with them.
- *live*: activations, gradients on their way to a bucket and what operations need meanwhile. A trace counts them.
- *landing*: the whole gradients of buckets that wait for their reduction.
- *units*: the parameters that stage 3 has whole at once.
- *stepping*: the chunks of states that the optimizer has in memory while the others are on the disk.

Forward and backward have live, landing and units beside the states, the optimizer's step has stepping: the peak is the states
with the larger of the two.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

from .estimate import ModelStateBytes, model_state_bytes
from .layout import Bucket, FlatLayout

DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}

IN_FLIGHT = 2
"""Buckets whose reduction is under way at once."""

BEHIND = 2
"""Gradients that are on their way to the disk while the next is reduced."""


@dataclass(frozen=True)
class Arrival:
    """Backward has the gradient of the parameter ``name``. ``live``: the most bytes since the arrival before."""

    name: str
    live: int


@dataclass(frozen=True)
class Trace:
    """One forward and backward of a micro-batch: the gradients in order, and its floating-point operations."""

    arrivals: tuple[Arrival, ...]
    flops: int


@dataclass(frozen=True)
class StepSettings:
    """How a step is taken. ``gradient_bytes`` per element are kept (None: as many as the model has); the optimizer keeps
    ``optimizer_states`` fp32 values per element. ``fetch_ahead`` elements of units are fetched before they are needed.
    ``copies``: collectives need a copy of what arrives, as those made of point-to-point sends do. ``constructs``: the model
    is constructed in this memory, in fp32; at stage 3 under ``zero.Init``."""

    stage: int
    ranks: int = 1
    parameters_on_disk: bool = False
    states_on_disk: bool = False
    gradient_bytes: int | None = None
    optimizer_states: int = 2
    fetch_ahead: int = 50_000_000
    chunks: int = 3
    copies: bool = True
    constructs: bool = True


@dataclass(frozen=True)
class Demand:
    """Bytes on one rank. ``base`` is the interpreter with its libraries. The phases beside the states are ``live`` with
    ``reducing`` (landing, copies for collectives, gradients on their way to the disk) at the worst moment of forward and
    backward, with ``units``; and ``stepping``."""

    base: int
    states: ModelStateBytes
    disk: ModelStateBytes
    live: int
    reducing: int
    units: int
    stepping: int
    construction: int

    @property
    def peak(self) -> float:
        """The most memory."""
        step = max(self.live + self.reducing + self.units, self.stepping)
        return self.base + max(self.construction, self.states.total + step)


def demand(layout: FlatLayout, trace: Trace, settings: StepSettings, *, base: int) -> Demand:
    """What training of the parameters of ``layout`` needs. The interpreter takes ``base`` bytes."""
    states = [_states(bucket, settings) for bucket in layout.buckets]
    on_disk = [_on_disk(bucket, found, settings) for bucket, found in zip(layout.buckets, states, strict=True)]
    total, below = _total(states), _total(on_disk)
    live, reducing = _worst_moment(layout, trace, settings)
    return Demand(
        base=base,
        states=_difference(total, below),
        disk=below,
        live=live,
        reducing=reducing,
        units=_units(layout, settings),
        stepping=_stepping(on_disk, settings),
        construction=_construction(layout, total, settings),
    )


def dtype_bytes(bucket: Bucket) -> int:
    """Bytes of an element of ``bucket``."""
    return DTYPE_BYTES[bucket.dtype]


def _states(bucket: Bucket, settings: StepSettings) -> ModelStateBytes:
    """The states of one bucket. One without a unit is whole on every rank at stage 3 too."""
    stage, nbytes = settings.stage, dtype_bytes(bucket)
    found = model_state_bytes(
        bucket.numel,
        stage=stage,
        world_size=settings.ranks,
        dtype_bytes=nbytes,
        optimizer_states=settings.optimizer_states,
    )
    whole = float(bucket.numel * nbytes) if bucket.unit is None else found.parameters
    gradients = found.gradients * (settings.gradient_bytes or nbytes) / nbytes
    return ModelStateBytes(whole, gradients, found.master, found.optimizer)


def _on_disk(bucket: Bucket, states: ModelStateBytes, settings: StepSettings) -> ModelStateBytes:
    """Those of ``states`` that lie on the disk."""
    below = settings.states_on_disk
    return ModelStateBytes(
        parameters=states.parameters if settings.parameters_on_disk and bucket.unit is not None else 0,
        gradients=states.gradients if below and settings.stage >= 2 else 0,
        master=states.master if below else 0,
        optimizer=states.optimizer if below else 0,
    )


def _worst_moment(layout: FlatLayout, trace: Trace, settings: StepSettings) -> tuple[int, int]:
    """Live bytes, and those that reduction needs, when both together are the most."""
    extra = 0
    if settings.copies and settings.ranks > 1:
        sizes = sorted((bucket.numel * dtype_bytes(bucket) for bucket in layout.buckets), reverse=True)
        extra += sum(sizes[:IN_FLIGHT]) * (settings.ranks - 1) // settings.ranks
    if settings.states_on_disk and settings.stage >= 2:
        slices = sorted((b.slice_numel * (settings.gradient_bytes or dtype_bytes(b)) for b in layout.buckets), reverse=True)
        extra += sum(slices[: BEHIND + 1])
    moments = [(trace.arrivals[0].live, 0)]  # until the first gradient arrives nothing is reduced
    landing = _landing(layout, trace, settings) if settings.stage >= 2 else [0] * len(trace.arrivals)
    moments += [(arrival.live, landed + extra) for arrival, landed in zip(trace.arrivals[1:], landing, strict=False)]
    return max(moments, key=sum)


def _landing(layout: FlatLayout, trace: Trace, settings: StepSettings) -> Iterator[int]:
    """The bytes of landing buffers after each arrival. Buckets are reduced in turn, those of a unit when it is complete;
    a pool keeps as many buffers as were in use at once."""
    missing = {bucket.index: len(bucket.placements) for bucket in layout.buckets}
    nbytes = {bucket.index: bucket.numel * dtype_bytes(bucket) for bucket in layout.buckets}
    waiting = [bucket.index for bucket in layout.buckets]
    landed: set[int] = set()
    flying: list[int] = []
    most = 0
    by_unit = settings.stage >= 3
    for arrival in trace.arrivals:
        bucket, _ = layout.homes[arrival.name]
        missing[bucket.index] -= 1
        landed.add(bucket.index)
        most = max(most, sum(nbytes[index] for index in landed))
        ready = [index for index in waiting if not missing[index]] if by_unit else _leading(waiting, missing)
        for index in ready:
            waiting.remove(index)
            flying.append(index)
            landed.add(index)
        while len(flying) > IN_FLIGHT:
            landed.discard(flying.pop(0))
        yield most


def _leading(waiting: Sequence[int], missing: dict[int, int]) -> list[int]:
    """The first of ``waiting`` that are complete, up to one that is not."""
    found = []
    for index in waiting:
        if missing[index] > 0:
            break
        found.append(index)
    return found


def _units(layout: FlatLayout, settings: StepSettings) -> int:
    """The most bytes of units that are whole at once: one, and those fetched ahead of it, the next at least."""
    if settings.stage < 3 or (settings.ranks == 1 and not settings.parameters_on_disk):
        return 0
    sizes: dict[int, list[int]] = {}
    for bucket in layout.buckets:
        if bucket.unit is not None:
            numel, nbytes = sizes.get(bucket.unit, [0, 0])
            sizes[bucket.unit] = [numel + bucket.numel, nbytes + bucket.numel * dtype_bytes(bucket)]
    units = [sizes[index] for index in sorted(sizes)]
    most = 0
    for index, (_, total) in enumerate(units):
        ahead = 0
        for numel, nbytes in units[index + 1 :]:
            if ahead and ahead + numel > settings.fetch_ahead:
                break
            ahead += numel
            total += nbytes
        most = max(most, total)
    return most


def _stepping(on_disk: Sequence[ModelStateBytes], settings: StepSettings) -> int:
    """The most bytes of chunks that are in memory at once: those read, stepped and written."""
    if not settings.states_on_disk:
        return 0
    sizes = [states.total for states in on_disk]
    windows = (sizes[index : index + settings.chunks] for index in range(len(sizes)))
    return int(max(map(sum, windows), default=0))


def _construction(layout: FlatLayout, states: ModelStateBytes, settings: StepSettings) -> int:
    """The most bytes while the model, constructed in fp32, moves into its buckets."""
    if not settings.constructs or settings.stage >= 3:
        return 0
    whole = sum(bucket.numel for bucket in layout.buckets) * 4
    largest = max(bucket.numel * (4 + dtype_bytes(bucket)) for bucket in layout.buckets)
    master = 0 if settings.states_on_disk else states.master
    return int(max(whole, states.parameters + master)) + largest


def _total(parts: Sequence[ModelStateBytes]) -> ModelStateBytes:
    names = [field.name for field in fields(ModelStateBytes)]
    return ModelStateBytes(**{name: sum(getattr(part, name) for part in parts) for name in names})


def _difference(whole: ModelStateBytes, part: ModelStateBytes) -> ModelStateBytes:
    names = [field.name for field in fields(ModelStateBytes)]
    return ModelStateBytes(**{name: getattr(whole, name) - getattr(part, name) for name in names})


@dataclass(frozen=True)
class Rates:
    """What the hardware does in a second: ``multiply`` floating-point operations, bytes of ``memory`` copied, of the disk
    ``read`` and ``write``, and of the ``network`` (None: not known)."""

    multiply: float
    memory: float
    read: float
    write: float
    network: float | None = None


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step: what computing takes, and the disk beside it in forward and backward; what the optimizer takes in
    memory, and the disk beside it; and communication (0 where its rate is not known)."""

    computing: float
    computing_disk: float
    optimizer: float
    optimizer_disk: float
    communication: float

    @property
    def total(self) -> float:
        """The disk works beside the processor; communication is taken to overlap with nothing."""
        step = max(self.optimizer, self.optimizer_disk)
        return max(self.computing, self.computing_disk) + step + self.communication


def step_time(needs: Demand, trace: Trace, rates: Rates, settings: StepSettings, *, accumulation: int = 1) -> StepTime:
    """How long a step of ``accumulation`` micro-batches takes, at best. All ranks share the disk."""
    disk, states, ranks = needs.disk, needs.states, settings.ranks
    updated = disk.parameters + disk.master + disk.optimizer
    gradient_reads = disk.gradients * (accumulation - 1)
    reads = 2 * disk.parameters * accumulation + gradient_reads
    whole = (states.parameters + disk.parameters) * (ranks if settings.stage >= 3 else 1)
    passes = (2 * accumulation + 1) if settings.stage >= 3 else 2
    sent = passes * whole * (ranks - 1) / ranks
    return StepTime(
        computing=accumulation * trace.flops / rates.multiply,
        computing_disk=ranks * (reads / rates.read + disk.gradients * accumulation / rates.write),
        # A copy reads and writes each byte; the step reads all states and writes all but the gradients.
        optimizer=(2 * (states.total + disk.total) - states.gradients - disk.gradients) / (2 * rates.memory),
        optimizer_disk=ranks * ((updated + disk.gradients) / rates.read + updated / rates.write),
        communication=sent / rates.network if rates.network else 0.0,
    )
