"""A unit of ZeRO stage 3: parameters that are gathered by one collective per dtype, and released together.

The nouns:

- *part*: the unit's parameters of one optimizer group and dtype: a bucket of a flat layout. Each rank keeps its *slice*
  of it for good; the *whole* buffer has memory only while the unit is not sharded.
- *second slice*: with a second copy (ZeRO++ hpZ) a rank also keeps its slice among the ranks nearby of what was gathered
  last. While the values are the same, the unit is gathered from there.
- *view*: a parameter's place in the whole buffer. When the unit is whole, it is the parameter's memory.

The buffer's storage is resized, not replaced: what autograd saved of a parameter in forward (a transposed view, say)
finds the values again when the unit is fetched for backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from enum import Enum
from functools import partial
from typing import NoReturn, Protocol

import torch
from torch import Tensor, nn

from ..comm.communicator import Communicator
from ..comm.operations import DONE, Pending
from ..comm.sharding import ShardGroups
from ..memory.layout import Bucket
from ..memory.tiers import Chunk
from ..native.files import FileTransfer
from . import released
from .arriving import Hops
from .parameters import FlatParameters
from .presence import OffloadStateTypeEnum

OnTouch = Callable[["ParameterUnit", nn.Parameter, str], None]
"""Makes a released parameter of a unit whole for an operation (its name), or raises."""

OnMemory = Callable[["ParameterUnit", int], None]
"""Hears of so many elements more, or fewer, that have memory."""


class Constructor(Protocol):
    """Constructs the model that a unit belongs to."""

    def copied(self, unit: ParameterUnit, parameter: nn.Parameter) -> nn.Parameter:
        """A copy of a released ``parameter`` of ``unit``, released too."""

    def settle(self) -> None:
        """Wait until all slices have arrived that units were given."""


class UnitState(Enum):
    """Where a unit's values are, and what they cost this rank."""

    SHARDED = "bytes / ranks: the own slices"
    FETCHED = "bytes on top of that, being filled or kept for later; not the parameters' memory"
    WHOLE = "bytes on top of that, the parameters' memory"


class UnitPart:
    """The parameters of ``bucket`` of ``flat``, which have moved in. With a single rank the whole buffer is the slice
    itself, and never freed, unless the slice lies below memory."""

    def __init__(self, flat: FlatParameters, bucket: Bucket):
        self.flat = flat
        self.bucket = bucket
        self.second: Tensor | None = None
        self.views: list[tuple[nn.Parameter, Tensor]] = [
            (flat.parameters[place.spec.name], flat.view(bucket, place).view(place.spec.shape)) for place in bucket.placements
        ]

    @property
    def chunk(self) -> Chunk:
        """What of the slice lies below memory."""
        return self.flat.chunks[self.bucket.index]

    @property
    def whole(self) -> Tensor:
        """The buffer (1-D)."""
        return self.flat.buffers[self.bucket.index]

    def start_fetch(self, communicator: Communicator, hops: Hops, *, tag: int, purpose: str, second: bool = False) -> Pending:
        """Begin to gather the whole buffer from ``communicator``'s slices, under a tag of its unit's: the ranks' own ones, or
        the second ones. Those on a disk come by ``hops``."""
        self.flat.presence.require(f"the {purpose}", OffloadStateTypeEnum.lp_params)
        if not self.flat.keeps_apart(self.bucket):
            return DONE
        self.whole.untyped_storage().resize_(self.whole.numel() * self.whole.element_size())
        target = self.whole.chunk(communicator.size)[communicator.rank]
        if second:
            assert self.second is not None, "a second slice is gathered after keep_second"
            target.copy_(self.second)
        reading = None if second else self._start_copy(target)

        def gather() -> Pending:
            return communicator.all_gather(self.whole, tag=tag, purpose=purpose)

        return hops.start(reading, gather)

    def keep_second(self, nearby: Communicator) -> None:
        """Keep this rank's second slice of the buffer, which is whole."""
        mine = self.whole.chunk(nearby.size)[nearby.rank]
        self.second = mine.clone() if self.second is None else self.second.copy_(mine)

    def _start_copy(self, target: Tensor) -> FileTransfer | None:
        """Begin to copy the slice to ``target``; None where it is there already."""
        own, tier = self.flat.own_slice(self.bucket), self.flat.parameter_tiers[self.bucket.index]
        if tier is not None:
            return tier.evictable(own).start_copy(target)
        target.copy_(own)
        return None

    def expose(self) -> None:
        """Make the buffer the parameters' memory."""
        for parameter, view in self.views:
            released.expose(parameter, view)

    def conceal(self) -> None:
        """Take the memory from the parameters."""
        for parameter, _ in self.views:
            released.release(parameter)

    def release(self) -> None:
        """Take the memory from the parameters and free it."""
        self.conceal()
        if not self.flat.keeps_apart(self.bucket):
            return
        if not self.whole.untyped_storage().resizable():  # a NumPy array has it, and keeps it
            whole = self.flat.buffers[self.bucket.index] = torch.empty_like(self.whole)
            self.views = [(p, whole.as_strided(v.shape, v.stride(), v.storage_offset())) for p, v in self.views]
        self.whole.untyped_storage().resize_(0)


class ParameterUnit:
    """The parameters of ``parts``, all sharded or all whole. ``holds`` counts who needs it whole now; ``on_touch`` is called
    for a parameter that is computed with while it is released, ``on_hold`` where the unit is made whole by hand,
    ``on_memory`` when the whole buffers get memory or lose it; ``hops``, of all units that share ``groups``, orders what comes
    from a disk. Released parameters have the shape (0,) where ``shows_sizes`` is False, and else their own, for who asks."""

    ranks_agree = True

    def __init__(self, index: int, name: str, parts: Sequence[UnitPart], groups: ShardGroups, hops: Hops | None = None):
        self.index = index
        self.name = name
        self.parts: tuple[UnitPart, ...] = ()
        self.numel = 0
        self.state = UnitState.SHARDED
        self.holds = 0
        self.on_touch: OnTouch = refuse
        self.on_hold: Callable[[ParameterUnit], None] = lambda unit: None
        self.constructor: Constructor | None = None
        self.on_memory: OnMemory = lambda unit, change: None
        self.shows_sizes = False
        self.hops = hops or Hops()
        self._groups = groups
        self._pending: list[Pending] = []
        self._has_second_copy = False
        for part in parts:
            self.add(part)

    def add(self, part: UnitPart) -> None:
        """Take in ``part``, whose parameters are whole where the unit is, and released or whole where it is not."""
        self.parts = (*self.parts, part)
        self.numel += part.bucket.numel
        self.forget_second_copy()
        for parameter, view in part.views:
            released.describe(parameter, self, shape=tuple(view.shape), shards=part.bucket.shards)
        if self.state is UnitState.SHARDED:
            part.release()

    def parameters(self) -> Iterator[nn.Parameter]:
        """The unit's parameters."""
        return (parameter for part in self.parts for parameter, _ in part.views)

    def start_fetch(self) -> None:
        """Begin to gather the unit, if nobody has. All ranks do so in the same order."""
        if self.state is UnitState.SHARDED:
            if self.constructor is not None:
                self.constructor.settle()
            tag, purpose = 1 + self.index, f"fetch of unit '{self.name}'"
            nearby = self._groups.nearby if self._has_second_copy else None
            second, group = nearby is not None, nearby or self._groups.shards
            with torch.no_grad():
                fetch = partial(
                    UnitPart.start_fetch, communicator=group, hops=self.hops, tag=tag, purpose=purpose, second=second
                )
                self._pending = [fetch(part) for part in self.parts]
            self.state = UnitState.FETCHED
            self.on_memory(self, self.numel)

    def finish_fetch(self) -> None:
        """Make the unit whole."""
        self.start_fetch()
        if self.state is UnitState.FETCHED:
            self._wait()
            for part in self.parts:
                part.expose()
            self.state = UnitState.WHOLE

    def set_aside(self) -> None:
        """Keep a whole unit's memory for the next fetch. The parameters are released: who computes with one is noticed."""
        if self.state is UnitState.WHOLE:
            for part in self.parts:
                part.conceal()
            self.state = UnitState.FETCHED

    def release(self) -> None:
        """Free the whole buffers; what was changed in them is lost unless it was kept."""
        if self.state is not UnitState.SHARDED:
            self._wait()
            for part in self.parts:
                part.release()
            self.state = UnitState.SHARDED
            self.on_memory(self, -self.numel)

    def forget_second_copy(self, *, free: bool = False) -> None:
        """Gather the values, which may change, anew from the ranks' own slices. ``free`` gives the memory up meanwhile."""
        self._has_second_copy = False
        for part in self.parts if free else ():
            part.second = None

    # -- the face of a home (released.Home) ----------------------------------------------------------------------------

    def hold(self) -> None:
        """Make the unit whole until ``let_go``."""
        self.finish_fetch()
        self.holds += 1
        self.on_hold(self)

    def let_go(self) -> None:
        """Take back a ``hold``; after the last one the unit is released."""
        self.holds -= 1
        if not self.holds:
            self.release()

    def touched(self, parameter: nn.Parameter, operation: str) -> None:
        """Make the unit whole for ``operation``, or raise."""
        self.on_touch(self, parameter, operation)

    def copied(self, parameter: nn.Parameter) -> nn.Parameter:
        """A copy of ``parameter``: released too while the model is constructed; else whole, or raise."""
        if self.constructor is not None:
            return self.constructor.copied(self, parameter)
        self.touched(parameter, "deepcopy")
        return nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)

    def keep(self, parameter: nn.Parameter, *, source: int | None) -> None:
        """Take this rank's part of the values that ``parameter`` has now into the slices and masters."""
        part = next(part for part in self.parts if any(mine is parameter for mine, _ in part.views))
        if source is not None:
            purpose = f"broadcast of {self.describe(parameter)}"
            self._groups.everyone.broadcast(parameter.detach(), source=source, purpose=purpose).wait()
        part.flat.keep(parameter, part.bucket)
        self.forget_second_copy()

    def give_up(self, parameter: nn.Parameter) -> None:
        """Leave ``parameter``, with the values that it has now, to another home."""
        for part in self.parts:
            part.views = [view for view in part.views if view[0] is not parameter]
            if not part.views:
                part.flat.drop(part.bucket)
        self.parts = tuple(part for part in self.parts if part.views)
        self.numel = sum(part.bucket.numel for part in self.parts)
        released.forget(parameter)

    def describe(self, parameter: nn.Parameter) -> str:
        """The parameter's name in the model and its shape."""
        named = (item for part in self.parts for item in part.flat.parameters.items())
        name = next(name for name, mine in named if mine is parameter)
        return f"'{name}' {tuple(released.shape_of(parameter))}"

    def retire(self, groups: ShardGroups | None = None) -> None:
        """Leave the parameters sharded, as ``zero.Init`` does: no modules fetch them any more, and computing with a released
        one is an error. From now on ``groups`` gather, where given."""
        if not self.holds:
            self.release()
        self._groups = groups or self._groups
        self.forget_second_copy(free=True)
        self.on_touch = refuse
        self.on_hold = lambda unit: None
        self.constructor = None
        self.shows_sizes = True

    def _wait(self) -> None:
        gathered, self._pending = self._pending, []
        for pending in gathered:
            pending.wait()
        if gathered and self._groups.nearby is not None and not self._has_second_copy:
            for part in self.parts:
                part.keep_second(self._groups.nearby)
            self._has_second_copy = True


class Replica:
    """The home of a parameter that is whole on every rank, outside the buckets of an optimizer."""

    ranks_agree = False

    def __init__(self, parameter: nn.Parameter, communicator: Communicator):
        self._communicator = communicator
        released.describe(parameter, self, shape=tuple(parameter.shape), shards=communicator.size)

    def hold(self) -> None:
        """The values are here."""

    def let_go(self) -> None:
        """The values stay."""

    def touched(self, parameter: nn.Parameter, operation: str) -> None:
        """Never called: the parameter is not released."""

    def copied(self, parameter: nn.Parameter) -> nn.Parameter:
        """A whole copy. Never called: the parameter is not released."""
        return nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)

    def keep(self, parameter: nn.Parameter, *, source: int | None) -> None:
        """Give all ranks rank ``source``'s values."""
        if source is not None:
            purpose = f"broadcast of a whole parameter of shape {tuple(parameter.shape)}"
            self._communicator.broadcast(parameter.detach(), source=source, purpose=purpose).wait()

    def give_up(self, parameter: nn.Parameter) -> None:
        """Leave ``parameter`` to another home."""
        released.forget(parameter)


class Resident(Replica):
    """The home of a trained parameter that is whole on every rank: its master follows what is kept."""

    def __init__(self, parameter: nn.Parameter, flat: FlatParameters, bucket: Bucket, communicator: Communicator):
        super().__init__(parameter, communicator)
        self._flat = flat
        self._bucket = bucket

    def keep(self, parameter: nn.Parameter, *, source: int | None) -> None:
        """Give all ranks rank ``source``'s values, and take them into the masters."""
        super().keep(parameter, source=source)
        self._flat.keep(parameter, self._bucket)


def refuse(unit: ParameterUnit, parameter: nn.Parameter, operation: str) -> NoReturn:
    """Raise the error for a parameter that is used while nothing can make it whole."""
    raise RuntimeError(
        f"{unit.describe(parameter)} is sharded by ZeRO stage 3 and was used ({operation}) while no module of the "
        "model runs: use it inside deepspeed.zero.GatheredParameters([parameter]), on all ranks"
    )
