"""Gradient reduction: from each parameter's gradient, as backward produces it, to this shard's slice of the mean.

The sequence of one backward:

1. ``begin(reduce=...)`` says whether this backward ends with reduced gradients.
2. As each parameter's gradient is ready, a hook moves it to its place in its bucket's *landing* buffer (adding to what
   earlier backwards left there) and frees it.
3. With ``reduce``, a bucket whose parameters have all arrived is *launched*: its landing buffer is handed to one
   collective. Buckets launch in layout order on every rank, so that collectives match whatever order autograd took.
   With units (stage 3), a unit's buckets are launched when its backward is over (``unit_done``), complete or not: a rank
   that waits for a reduction must not wait for one that has to fetch from it first.
4. ``finish()`` launches the other buckets, where parameters that got no gradient count as zero, and waits for all.

When a reduction runs and what is kept of it is the policy's matter: with whole gradients (stages 0, 1) only the last
backward of a step reduces, and the buffer stays; with sharded gradients (stage 2) every backward does, the slice adds
to ``gradient``, and the buffer goes back to the pool at once.

A gradient that arrives after its bucket was launched (re-entrant checkpointing of a shared parameter) lands in a fresh
buffer. It counts in the next reduction of its bucket; the optimizer asks for one more before it steps (``reduce_late``).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..comm.operations import Converted, Pending
from ..comm.sharding import ShardGroups
from ..memory.layout import Bucket, FlatLayout, Placement
from ..memory.pool import BufferPool
from .arrivals import Arrival
from .policy import ZeroPolicy
from .presence import GRADIENTS, Presence
from .tiers import GradientTier, in_memory

MAXIMUM_IN_FLIGHT = 2
"""Buckets whose reduction may be under way at once; it bounds the transient memory."""


@dataclass(frozen=True)
class ReductionSettings:
    """How gradients are reduced.

    ``divide_before`` and ``divide_after`` are the divisors applied as a gradient enters its bucket and to the reduced
    sum; their product is the number of ranks. ``communication_dtype`` None means the bucket's own. ``kept_dtype`` is
    the dtype in which gradients accumulate, None the model's own.
    """

    divide_before: float = 1.0
    divide_after: float = 1.0
    communication_dtype: torch.dtype | None = None
    kept_dtype: torch.dtype | None = None
    overlap: bool = True
    reduce_scatter: bool = True


@dataclass
class _BucketGradient:
    """The gradient of one bucket on its way."""

    bucket: Bucket
    landing: Tensor | None = None
    written: set[str] = field(default_factory=set)
    arrived: set[str] = field(default_factory=set)
    launched: bool = False
    gradient: Tensor | None = None
    kept: Tensor | None = None
    tier: GradientTier | None = None

    @property
    def complete(self) -> bool:
        return len(self.arrived) == len(self.bucket.placements)


@dataclass(frozen=True)
class _Reduction:
    """A reduction under way of ``buffer``, whose own part holds the result unless that is written to ``result``."""

    state: _BucketGradient
    buffer: Tensor
    operation: Pending
    result: Tensor | None = None


class GradientReducer:
    """Collects and reduces the gradients of ``parameters``, laid out by ``layout``. ``tier_of`` says of a
    bucket where its reduced gradient lies below memory: only what is sharded can."""

    def __init__(
        self,
        layout: FlatLayout,
        parameters: Mapping[str, nn.Parameter],
        *,
        policy: ZeroPolicy,
        groups: ShardGroups,
        settings: ReductionSettings,
        tier_of: Callable[[Bucket], GradientTier | None] = in_memory,
    ):
        self.policy = policy
        self.groups = groups
        self.settings = settings
        self.used: set[str] = set()
        self.tier_of = tier_of
        self._parameters: Mapping[str, nn.Parameter] = {}
        self._buckets: list[_BucketGradient] = []
        self._hooks: list[RemovableHandle] = []
        self._pool = BufferPool()
        self._in_flight: deque[_Reduction] = deque()
        self._waiting: list[_BucketGradient] = []
        self._by_unit = False
        self._reducing = False
        self._reduced = False
        self.presence = Presence()
        self._collect(layout.buckets, parameters)

    def extend(self, buckets: Sequence[Bucket], parameters: Mapping[str, nn.Parameter]) -> None:
        """Collect the gradients of ``parameters`` too, which lie in ``buckets``, the layout's next. Those that they have
        already count in the next reduction. Not between ``begin`` and ``finish``."""
        for arrival, parameter in self._collect(buckets, parameters):
            if parameter.grad is not None:
                arrival(parameter)

    def begin(self, *, reduce: bool) -> None:
        """Open a backward. ``reduce`` False leaves its gradients in the landing buffers, as they are on this rank."""
        self._complete_in_flight(0)
        for state in self._buckets:
            state.arrived.clear()
        self._waiting = list(self._buckets)
        self._reducing = reduce

    def unit_done(self, unit: int) -> None:
        """The backward of the unit of this index is over: reduce its buckets. All ranks call it in the same order."""
        if self._reducing:
            done = [state for state in self._waiting if state.bucket.unit == unit]
            self._waiting = [state for state in self._waiting if state.bucket.unit != unit]
            for state in done:
                self._launch(state)

    def finish(self) -> None:
        """Close a backward: with ``reduce``, every bucket is reduced when this returns."""
        if not self._reducing:
            return
        while self._waiting:
            self._launch(self._waiting.pop(0))
        self._complete_in_flight(0)
        for tier in {state.tier for state in self._buckets if state.tier is not None}:
            tier.settle()
        self._reducing = False
        self._reduced = True
        self._pool.release()
        self.groups.release_scratch()

    def ensure_reduced(self) -> None:
        """Reduce what backwards outside ``begin`` and ``finish`` left, if no reduction has happened since ``clear``."""
        if not self._reduced:
            self.begin(reduce=True)
            self.finish()

    def late(self) -> list[bool]:
        """For each bucket, whether a gradient arrived after its reduction."""
        return [state.landing is not None for state in self._buckets]

    def reduce_late(self, buckets: Sequence[bool]) -> None:
        """Reduce the marked buckets once more. All ranks must mark the same ones."""
        for state, marked in zip(self._buckets, buckets, strict=True):
            if marked:
                self._launch(state)
                self._complete_in_flight(0)

    def gradients(self) -> Iterator[tuple[Bucket, Tensor]]:
        """Each bucket with the reduced gradient of this shard's slice, as a 1-D tensor. After ``finish`` only."""
        for state in self._buckets:
            assert state.gradient is not None, "gradients() is called after finish()"
            yield state.bucket, state.gradient

    def gradient(self, bucket: Bucket) -> Tensor | None:
        """The reduced gradient of this shard's slice of ``bucket``, None before the first reduction of a step."""
        return self._buckets[bucket.index].gradient

    def whole_gradient(self, bucket: Bucket) -> Tensor | None:
        """The whole reduced gradient of ``bucket`` where every rank keeps it, None elsewhere."""
        return None if self.policy.shard_optimizer else self._buckets[bucket.index].gradient

    def clear(self) -> None:
        """Forget all gradients. Whole buffers stay allocated for the next step, and so do the sums of slices."""
        self._complete_in_flight(0)
        for state in self._buckets:
            state.landing = None
            state.gradient = None
            state.launched = False
            state.written.clear()
            state.arrived.clear()
        for parameter in self._parameters.values():
            parameter.grad = None
        self.used.clear()
        self._reducing = self._reduced = False

    def accumulate_in(self, dtype: torch.dtype | None) -> None:
        """Keep gradients in ``dtype`` (the model's where None) from the next step on. Forgets present ones."""
        if dtype != self.settings.kept_dtype:
            self.clear()
            self.settings = replace(self.settings, kept_dtype=dtype)
            for state in self._buckets:
                state.kept = None

    def buffers(self, *, kept: bool) -> Iterator[Tensor]:
        """The buffers that are allocated now: those that are kept from step to step, or the others, in which gradients wait
        for their reduction."""
        pairs = ((s.kept, s.kept if kept else s.landing) for s in self._buckets)
        return (buffer for own, buffer in pairs if buffer is not None and (buffer is own) == kept)

    def free_idle(self) -> None:
        """Free the kept buffers that hold no gradients now."""
        for state in self._buckets:
            if state.gradient is None and state.landing is None:
                state.kept = None

    def close(self) -> None:
        """Take the hooks off the parameters and drop all buffers."""
        for hook in self._hooks:
            hook.remove()
        self.clear()
        self._hooks.clear()
        self._pool.release()
        self._buckets.clear()
        self.tier_of = in_memory

    def _collect(
        self, buckets: Sequence[Bucket], parameters: Mapping[str, nn.Parameter]
    ) -> list[tuple[Arrival, nn.Parameter]]:
        self._parameters = {**self._parameters, **parameters}
        self._by_unit = self._by_unit or any(bucket.unit is not None for bucket in buckets)
        collected = []
        for bucket in buckets:
            state = _BucketGradient(bucket, tier=self.tier_of(bucket))
            self._buckets.append(state)
            for placement in state.bucket.placements:
                parameter, arrival = parameters[placement.spec.name], Arrival(partial(self._receive, state, placement))
                # torch refuses the hook to a parameter that is frozen at the moment, but it lives through a freeze.
                trained, parameter.requires_grad = parameter.requires_grad, True
                self._hooks.append(parameter.register_post_accumulate_grad_hook(arrival))
                parameter.requires_grad = trained
                collected.append((arrival, parameter))
        return collected

    # -- arrival -------------------------------------------------------------------------------------------------

    def _receive(self, state: _BucketGradient, placement: Placement, gradient: Tensor) -> None:
        self.presence.require("backward", *GRADIENTS)
        self._land(state, placement, gradient)
        while self._reducing and not self._by_unit and self._waiting and self._waiting[0].complete:
            self._launch(self._waiting.pop(0))

    def _land(self, state: _BucketGradient, placement: Placement, gradient: Tensor) -> None:
        name = placement.spec.name
        if state.landing is None:
            state.landing = self._new_landing(state)
            state.written.clear()
        slot = state.landing[placement.start : placement.stop].view(placement.spec.shape)
        factor = 1.0 / self.settings.divide_before
        if name in state.written:
            slot.add_(gradient, alpha=factor)
        elif gradient.is_sparse:
            slot.zero_().add_(gradient, alpha=factor)
        elif gradient.dtype == slot.dtype and factor != 1.0:
            torch.mul(gradient, factor, out=slot)
        else:
            slot.copy_(gradient)
            if factor != 1.0:
                slot.mul_(factor)
        state.written.add(name)
        state.arrived.add(name)
        self.used.add(name)

    def _new_landing(self, state: _BucketGradient) -> Tensor:
        if self.policy.shard_gradients or state.launched:
            # What is reduced at once is not added to; what waits for later backwards is.
            dtype = self._model_dtype(state) if self._reducing else self._kept_dtype(state)
            return self._pool.take(state.bucket.numel, dtype=dtype, device=self._device(state))
        if state.kept is None:
            state.kept = self._allocate(state, state.bucket.numel)
        return state.kept

    # -- reduction -----------------------------------------------------------------------------------------------

    def _launch(self, state: _BucketGradient) -> None:
        landing = state.landing if state.landing is not None else self._new_landing(state)
        written = state.written if state.landing is not None else set()
        for placement in state.bucket.placements:
            if placement.spec.name not in written:
                landing[placement.start : placement.stop].zero_()
        for gap in state.bucket.gaps:
            landing[gap].zero_()
        sent = landing.to(self._sent_dtype(state))
        state.landing = None
        state.written = set()
        state.launched = True
        self._complete_in_flight(MAXIMUM_IN_FLIGHT - 1 if self.settings.overlap else 0)
        self._in_flight.append(self._reduction(state, landing, sent))
        if not self.settings.overlap:
            self._complete_in_flight(0)

    def _reduction(self, state: _BucketGradient, landing: Tensor, sent: Tensor) -> _Reduction:
        scale, purpose = 1.0 / self.settings.divide_after, f"reduction of {state.bucket.label}"
        if not (self.policy.shard_optimizer and self.settings.reduce_scatter):
            operation = self.groups.everyone.all_reduce(sent, scale=scale, purpose=purpose)
            return _Reduction(state, landing, Converted(operation, sent, landing))
        if sent is not landing or not self._sums_in_place_of_kept(state, sent.dtype):
            operation = self.groups.reduce_scatter(sent, scale=scale, purpose=purpose)
            return _Reduction(state, landing, Converted(operation, sent, landing))
        kept, adds = self._kept_slice(state), state.gradient is not None
        operation = self.groups.reduce_scatter(sent, out=kept, scale=scale, accumulate=adds, purpose=purpose)
        return _Reduction(state, landing, operation, result=kept)

    def _sums_in_place_of_kept(self, state: _BucketGradient, sent: torch.dtype) -> bool:
        """Whether the sum over ranks can go straight into the slice that is kept, in one pass over memory."""
        wide, kept = torch.promote_types(sent, torch.float32), self._kept_dtype(state)
        return self.policy.shard_gradients and (kept == wide or (kept == sent and state.gradient is None))

    def _complete_in_flight(self, remaining: int) -> None:
        while len(self._in_flight) > remaining:
            reduction = self._in_flight.popleft()
            reduction.operation.wait()
            self._keep(reduction)

    def _keep(self, reduction: _Reduction) -> None:
        """Put a reduced buffer's own part where the optimizer reads it."""
        state, buffer = reduction.state, reduction.buffer
        own = buffer[state.bucket.slice_range(self._shard)]
        if reduction.result is not None:
            state.gradient = reduction.result
        elif not self.policy.shard_gradients:
            state.gradient = own if state.gradient is None else state.gradient.add_(own)
        elif state.gradient is None:
            state.gradient = self._kept_slice(state).copy_(own)
        else:
            self._kept_slice(state).add_(own)
        if state.tier is not None and state.gradient is not None:
            state.tier.send(state.gradient)
        if buffer is not state.kept:
            self._pool.give_back(buffer)

    def _kept_slice(self, state: _BucketGradient) -> Tensor:
        if state.kept is None:
            state.kept = self._allocate(state, state.bucket.slice_numel)
        if state.tier is not None:
            state.tier.bring(state.kept, values=state.gradient is not None)
        return state.kept

    @property
    def _shard(self) -> int:
        return self.groups.shards.rank if self.policy.shard_optimizer else 0

    def _allocate(self, state: _BucketGradient, numel: int) -> Tensor:
        return torch.empty(numel, dtype=self._kept_dtype(state), device=self._device(state))

    def _sent_dtype(self, state: _BucketGradient) -> torch.dtype:
        """The dtype of the next reduction: the same on all ranks, whatever has landed on this one."""
        if self.settings.communication_dtype is not None:
            return self.settings.communication_dtype
        passing = self.policy.shard_gradients or state.launched
        return self._model_dtype(state) if passing else self._kept_dtype(state)

    def _kept_dtype(self, state: _BucketGradient) -> torch.dtype:
        return self.settings.kept_dtype or self._model_dtype(state)

    def _model_dtype(self, state: _BucketGradient) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, state.bucket.dtype)
        return dtype

    def _device(self, state: _BucketGradient) -> torch.device:
        return self._parameters[state.bucket.placements[0].spec.name].device
