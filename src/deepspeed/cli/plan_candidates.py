"""The ways to train a model that ``deepspeed plan`` compares: each is a configuration, laid out as an engine would."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import nn

from ..accelerator import get_accelerator
from ..config import load_config
from ..engine.build import build_layout, fetch_limits, name_parameters
from ..engine.precision import PrecisionPolicy
from ..memory.demand import Demand, Rates, StepSettings, StepTime, Trace, demand, step_time
from ..memory.layout import FlatLayout
from .plan_model import Workload

PRECISIONS = {"torch.bfloat16": "bf16", "torch.float16": "fp16"}
TIERS = {"nothing": (False, False), "optimizer": (False, True), "parameters, optimizer": (True, True)}
"""What lies on the disk: parameters, states."""

WAYS = [(stage, "nothing") for stage in range(4)] + [(stage, "optimizer") for stage in (1, 2, 3)]
WAYS += [(3, "parameters, optimizer")]


@dataclass(frozen=True)
class Hardware:
    """Bytes of ``memory`` of each of ``ranks``, and of the ``disk`` that they share, with its directory ``folder``."""

    memory: int
    disk: int
    ranks: int
    folder: str


@dataclass(frozen=True)
class Candidate:
    """One way to train, and what it needs."""

    configuration: dict[str, Any]
    workload: Workload
    settings: StepSettings
    layout: FlatLayout
    trace: Trace
    needs: Demand
    time: StepTime
    on_disk: str

    @cached_property
    def seconds(self) -> float:
        """Of a step."""
        return self.time.total

    def missing(self, hardware: Hardware) -> list[str]:
        """What there is too little of."""
        short = {
            "memory": self.needs.peak > hardware.memory,
            "disk": self.needs.disk.total * self.settings.ranks > hardware.disk,
        }
        return [name for name, is_short in short.items() if is_short]


def candidates(
    model: nn.Module, trace: Trace, workload: Workload, hardware: Hardware, rates: Rates, *, base: int
) -> list[Candidate]:
    """All ways for ``model``, of which ``trace`` is a micro-batch; those with a disk where there is one."""
    ways = [way for way in WAYS if way[1] == "nothing" or hardware.disk]
    return [_candidate(model, trace, workload, hardware, rates, way, base) for way in ways]


def choose(found: Sequence[Candidate], hardware: Hardware) -> Candidate | None:
    """The fastest that fits; of equal ones the first. None where none does."""
    fitting = [candidate for candidate in found if not candidate.missing(hardware)]
    return min(fitting, key=lambda candidate: round(candidate.seconds, 3), default=None)


def refusal(found: Sequence[Candidate], hardware: Hardware) -> Iterator[str]:
    """Why nothing fits, with the numbers, and what would help."""
    least = min(found, key=lambda c: (len(c.missing(hardware)), c.needs.peak))
    needs, disk = least.needs, least.needs.disk.total * hardware.ranks
    yield (
        f"nothing fits. Nearest: stage {least.settings.stage} with {least.on_disk} on the disk"
        f"{' and checkpointing' if least.workload.checkpointing else ''}:"
    )
    computing, stepping = needs.live + needs.reducing + needs.units, needs.stepping
    yield (
        f"memory: {needs.base / 1e9:.2f} GB of Python and libraries + {needs.states.total / 1e9:.2f} of states + the larger "
        f"of {computing / 1e9:.2f} (activations {needs.live / 1e9:.2f}, gradients on their way {needs.reducing / 1e9:.2f}, "
        f"gathered units {needs.units / 1e9:.2f}) and {stepping / 1e9:.2f} of the optimizer's step, or "
        f"{needs.construction / 1e9:.2f} to construct the model, is {needs.peak / 1e9:.2f} GB; "
        f"there are {hardware.memory / 1e9:.2f}"
    )
    if disk:
        yield (
            f"disk: {needs.disk.total / 1e9:.2f} GB x {hardware.ranks} ranks is {disk / 1e9:.2f} GB; there are "
            f"{hardware.disk / 1e9:.2f}"
        )
    yield from (f"would help: {way}" for way in _remedies(found, least, hardware))


def _remedies(found: Sequence[Candidate], least: Candidate, hardware: Hardware) -> Iterator[str]:
    enough = [c for c in found if "memory" not in c.missing(hardware)]
    if enough:
        smallest = min(c.needs.disk.total * hardware.ranks for c in enough)
        yield f"a disk of {smallest / 1e9:.1f} GB"
    elif not hardware.disk:
        yield "a disk: give --disk"
    for ranks in (2 * hardware.ranks, 4 * hardware.ranks, 8 * hardware.ranks):
        layout, settings = _resharded(least.layout, ranks), replace(least.settings, ranks=ranks)
        needs = demand(layout, least.trace, settings, base=least.needs.base)
        if needs.peak <= hardware.memory and needs.disk.total * ranks <= hardware.disk:
            yield f"{ranks} ranks, of {needs.peak / 1e9:.2f} GB each"
            break
    if least.needs.live > least.needs.peak / 4:
        if not any(c.workload.checkpointing for c in found):
            yield "checkpointing of activations (--checkpointing on)"
        if least.workload.sequences > 1:
            sequences = f"activations of {least.workload.sequences} sequences"
            yield f"a smaller --micro-batch: {sequences} are {least.needs.live / 1e9:.2f} GB"
        else:
            yield f"a shorter --context: activations are {least.needs.live / 1e9:.2f} GB"


def _resharded(layout: FlatLayout, ranks: int) -> FlatLayout:
    return FlatLayout(tuple(replace(bucket, shards=ranks) for bucket in layout.buckets), ranks)


def _candidate(
    model: nn.Module, trace: Trace, workload: Workload, hardware: Hardware, rates: Rates, way: tuple[int, str], base: int
) -> Candidate:
    stage, on_disk = way
    configuration = _configuration(workload, hardware, stage, on_disk)
    config = load_config(configuration, world_size=hardware.ranks)
    groups = [{"params": [p for p in model.parameters() if p.requires_grad]}]
    precision = PrecisionPolicy.from_config(config)
    layout = build_layout(
        model, name_parameters(model, groups), groups, config=config, precision=precision, ranks=hardware.ranks
    ).trained
    parameters, states = TIERS[on_disk]
    is_cpu = get_accelerator().kind == "cpu"
    offload = config.zero_optimization.offload_optimizer
    settings = StepSettings(
        stage=stage,
        ranks=hardware.ranks,
        parameters_on_disk=parameters,
        states_on_disk=states,
        fetch_ahead=fetch_limits(config).ahead,
        chunks=1 + offload.reads_ahead + offload.writes_behind,
        copies=is_cpu,
        constructs=is_cpu,
    )
    needs = demand(layout, trace, settings, base=base)
    time = step_time(needs, trace, rates, settings)
    return Candidate(configuration, workload, settings, layout, trace, needs, time, on_disk)


def _configuration(workload: Workload, hardware: Hardware, stage: int, on_disk: str) -> dict[str, Any]:
    parameters, states = TIERS[on_disk]
    disk = {"device": "nvme", "nvme_path": hardware.folder}
    zero: dict[str, Any] = {"stage": stage}
    if states:
        # A quarter of the memory for the states of a step, 400 MB per buffer at most, as the default is.
        zero["offload_optimizer"] = {**disk, "buffer_size": min(100_000_000, hardware.memory // 64)}
    if parameters:
        zero["offload_param"] = {**disk, "max_in_cpu": 0}
    precision = PRECISIONS.get(str(workload.dtype))
    return {
        "train_micro_batch_size_per_gpu": workload.sequences,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
        **({precision: {"enabled": True}} if precision else {}),
        "zero_optimization": zero,
    }
