"""Room on the disk for the states that are to lie there: counted and reserved before there is anything to lose.

What a state takes is known from the layout, and of the optimizer's from a step on a few elements. Ranks whose files are on one
file system of one machine share its room.
"""

from __future__ import annotations

import errno
import os
import platform
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..comm.agreement import on_all_ranks
from ..comm.communicator import Communicator
from ..memory.layout import Bucket, FlatLayout, ParameterSpec
from ..memory.tiers import whole_blocks
from ..optim.segments import FlatShard, Segments
from ..optim.sharding import ShardUpdate, make_stepper
from .parameters import at_least_fp32
from .released import home_of
from .sharding import ModelLayout
from .tiers import Tiers
from .units import ParameterUnit

PROBE_NUMEL = 8
"""Elements of a step that shows which states an optimizer makes."""


@dataclass
class Room:
    """Bytes on the disk, by what lies there."""

    parameters: int = 0
    masters: int = 0
    gradients: int = 0
    optimizer_states: int = 0

    @property
    def states(self) -> int:
        """Bytes of the file of states."""
        return self.masters + self.gradients + self.optimizer_states

    def __str__(self) -> str:
        parts = {name.replace("_", " "): nbytes for name, nbytes in vars(self).items() if nbytes}
        return " + ".join(f"{in_gb(nbytes)} of {name}" for name, nbytes in parts.items())


def in_gb(nbytes: float) -> str:
    """Bytes as messages say them."""
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e7 else f"{nbytes / 1e6:.3f} MB"


@dataclass(frozen=True)
class StateSizes:
    """Bytes of what is kept of an element beside its parameter: the optimizer's states by parameter group, one number for each
    state; and whether gradients are on the disk, and of which dtype (None: the parameter's)."""

    optimizer: Sequence[Sequence[int]] = ()
    gradients: bool = False
    gradient_dtype: torch.dtype | None = None


def needed_room(layout: ModelLayout, tiers: Tiers, sizes: StateSizes) -> Room:
    """What the states of one rank take on ``tiers``. All ranks' take the same."""
    tiers, room = tiers.asked_in_advance(), Room()
    for flat, trained in ((layout.trained, True), (layout.frozen, False)):
        for bucket in flat.buckets:
            dtype: torch.dtype = getattr(torch, bucket.dtype)
            if tiers.of_parameters(bucket) is not None:
                room.parameters += whole_blocks(bucket.slice_numel * dtype.itemsize)
            if tiers.of_states(bucket) is not None and trained:
                _add_states(room, bucket, dtype, sizes)
    return room


def _add_states(room: Room, bucket: Bucket, dtype: torch.dtype, sizes: StateSizes) -> None:
    numel, wide = bucket.slice_numel, at_least_fp32(dtype)
    if wide is not dtype:
        room.masters += whole_blocks(numel * wide.itemsize)
    if sizes.gradients:
        room.gradients += whole_blocks(numel * (sizes.gradient_dtype or dtype).itemsize)
    # An optimizer's states have the dtype of what it steps.
    scale = wide.itemsize // torch.float32.itemsize
    room.optimizer_states += sum(whole_blocks(numel * nbytes * scale) for nbytes in sizes.optimizer[bucket.group])


def optimizer_state_sizes(optimizer: torch.optim.Optimizer, communicator: Communicator) -> list[list[int]]:
    """Bytes per element of each elementwise state that ``optimizer``, which steps slice by slice, makes of an fp32 slice, for
    each of its parameter groups."""
    layout = FlatLayout.build([ParameterSpec("probe", (PROBE_NUMEL,), "float32")], shards=1, bucket_numel=PROBE_NUMEL)
    (bucket,) = layout.buckets
    found = []
    for group in optimizer.param_groups:
        probe = _of_one_group(optimizer, group)
        shard = FlatShard(torch.zeros(bucket.numel), bucket, 0)
        stepper = make_stepper(Segments(probe, [shard]), communicator)
        update = ShardUpdate(shard, torch.zeros(bucket.numel), None)
        with torch.no_grad():
            stepper.step([update], gradient_scale=1.0, finished=lambda _: None)
        states = (value for state in probe.state.values() for value in state.values())
        found.append([s.element_size() for s in states if isinstance(s, Tensor) and s.shape == shard.tensor.shape])
    return found


def _of_one_group(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> torch.optim.Optimizer:
    """An optimizer with the options of ``group``, which shares nothing that changes with ``optimizer``: neither states nor
    what others hooked into its steps."""
    kind = type(optimizer)
    probe = kind.__new__(kind)
    own = {name: value for name, value in vars(optimizer).items() if name != "step"}
    vars(probe).update(own, state=defaultdict(dict), param_groups=[{**group, "params": []}])
    vars(probe).update({name: type(value)() for name, value in own.items() if name.endswith("_hooks")})
    return probe


def reserve_room(module: nn.Module, room: Room, tiers: Tiers, communicator: Communicator) -> None:
    """Have ``room`` in the files of ``tiers`` from now on. Called on all ranks, before anything moves.

    OSError on all ranks, with the arithmetic, where the disk is too small. Parameters of ``module`` that lie in a file already
    (``zero.Init``) give up as much as they take.
    """
    arriving = max(0, room.parameters - _given_up(module))
    files = [(tier, nbytes) for tier, nbytes in ((tiers.parameters, arriving), (tiers.states, room.states)) if tier is not None]
    wanted = [_Wanted.on(tier.folder, nbytes) for tier, nbytes in files]
    everyone = communicator.gather_objects(wanted, purpose="agreement on room on the disk")
    _refuse_too_small([one for of_rank in everyone for one in of_rank], ranks=communicator.size, room=room)

    def reserve() -> None:
        for tier, nbytes in files:
            tier.reserve(nbytes)

    on_all_ranks(reserve, communicator, what="the reservation of room on the disk", error=OSError)


@dataclass(frozen=True)
class _Wanted:
    """``nbytes`` more in ``folder``, on a file system of ``machine`` that has ``free`` ones."""

    machine: str
    device: int
    folder: str
    free: int
    nbytes: int

    @staticmethod
    def on(folder: Path, nbytes: int) -> _Wanted:
        found = os.statvfs(folder)
        return _Wanted(platform.node(), folder.stat().st_dev, str(folder), found.f_bavail * found.f_frsize, nbytes)


def _refuse_too_small(wanted: Iterable[_Wanted], *, ranks: int, room: Room) -> None:
    """Raise OSError for the first file system on which what is ``wanted`` of it has no room."""
    by_file_system: dict[tuple[str, int], list[_Wanted]] = defaultdict(list)
    for one in wanted:
        by_file_system[one.machine, one.device].append(one)
    for (machine, _), those in by_file_system.items():
        needed, free = sum(one.nbytes for one in those), min(one.free for one in those)
        if needed > free:
            folders = ", ".join(dict.fromkeys(one.folder for one in those))
            raise OSError(
                errno.ENOSPC,
                f"nvme_path {folders} of {machine} is too small: each of {ranks} ranks has {room}; that is {in_gb(needed)} "
                f"more on this file system, which has {in_gb(free)} free: {in_gb(needed - free)} are missing. Free some, "
                "choose another directory, or keep a part in memory (offload_optimizer.ratio, offload_param.max_in_cpu)",
            )


def _given_up(module: nn.Module) -> int:
    """Bytes that the parameters of ``module`` have in files that they are going to leave."""
    homes = {id(home): home for p in module.parameters() if isinstance(home := home_of(p), ParameterUnit)}
    slices = ((part.flat, part.bucket) for home in homes.values() for part in home.parts)
    dtypes = ((flat, bucket, getattr(torch, bucket.dtype)) for flat, bucket in slices)
    return sum(
        whole_blocks(bucket.slice_numel * dtype.itemsize)
        for flat, bucket, dtype in dtypes
        if flat.parameter_tiers[bucket.index] is not None
    )
