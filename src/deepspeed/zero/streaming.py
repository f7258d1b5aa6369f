"""The step's stream over chunks: the next one is read, and the last one is written, while one is stepped."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor

from .. import native
from ..memory.heap import give_back_holes
from ..memory.layout import Bucket
from ..memory.tiers import Evictable, Movable
from ..optim.segments import FlatShard
from ..optim.sharding import ShardUpdate
from .parameters import FlatParameters
from .reducer import GradientReducer

if TYPE_CHECKING:
    from .optimizer import ShardedOptimizer


def move_with_masters(optimizer: ShardedOptimizer, shards: Iterable[FlatShard]) -> None:
    """Let states and gradients of ``shards`` be where their masters are."""
    for shard in shards:
        optimizer.flat.chunks[shard.bucket.index].include(partial(_below_memory, optimizer, shard))


def give_up_states(optimizer: ShardedOptimizer, shard: FlatShard) -> None:
    """Give up the places of the states of ``shard``, which others are to replace."""
    tier = optimizer.flat.optimizer_tiers[shard.bucket.index]
    if tier is not None:
        for tensor in _states_of(optimizer, shard):
            tier.forget(tensor)


def squared_norms(reducer: GradientReducer) -> Iterator[tuple[float, bool]]:
    """``native.squared_norm`` of each reduced gradient; of those below memory it is known."""
    for bucket, gradient in reducer.gradients():
        tier = reducer.tier_of(bucket)
        yield native.squared_norm(gradient) if tier is None else tier.squared_norm(gradient)


def in_turn(updates: Sequence[ShardUpdate], flat: FlatParameters, reducer: GradientReducer) -> Iterator[ShardUpdate]:
    """``updates``, each while its chunk is in memory. Whoever asks for the next is done with the last."""
    ahead, behind = flat.tiers.ahead, flat.tiers.behind
    chunks = [flat.chunks[update.shard.bucket.index] for update in updates]
    overwritten = [_overwritten(update, flat) for update in updates]
    try:
        for index, update in enumerate(updates):
            for coming in range(index, min(index + 1 + ahead, len(chunks))):
                chunks[coming].start_fetch(save=overwritten[coming])
            chunks[index].fetch(save=overwritten[index])
            yield update
            for evictable in _gradients_below(reducer, update.shard.bucket):
                evictable.drop()
            chunks[index].start_evict()
            if index >= behind:
                chunks[index - behind].evict()
    finally:
        for chunk in chunks:
            chunk.evict()
        if flat.tiers.states is not None:
            give_back_holes()


def _overwritten(update: ShardUpdate, flat: FlatParameters) -> Evictable | None:
    """What of the chunk of ``update`` need not be read, for the step writes all of it: the 16-bit slice, unless a part of it
    is of parameters that are left alone, or it is half of the master."""
    bucket = update.shard.bucket.index
    tier = flat.parameter_tiers[bucket]
    if tier is None or update.out is None or not update.out.numel() or bucket in flat.splits:
        return None
    whole = all(fragment.spec.name not in update.unused for fragment in update.shard.fragments)
    return tier.evictable(update.out) if whole else None


def _below_memory(optimizer: ShardedOptimizer, shard: FlatShard) -> list[Movable]:
    if not optimizer.shards:  # the engine was destroyed, and the model kept its slices
        return []
    tier = optimizer.flat.optimizer_tiers[shard.bucket.index]
    mine = [] if tier is None else [tier.evictable(tensor) for tensor in _states_of(optimizer, shard)]
    return [*(evictable for evictable in mine if evictable is not None), *_gradients_below(optimizer.reducer, shard.bucket)]


def _states_of(optimizer: ShardedOptimizer, shard: FlatShard) -> Iterator[Tensor]:
    """The optimizer's states of ``shard`` that have a value for each element."""
    states = (optimizer.state.get(segment.tensor, {}) for segment in optimizer.segments.of(shard))
    return (v for state in states for v in state.values() if isinstance(v, Tensor) and v.dim() and v.numel())


def _gradients_below(reducer: GradientReducer, bucket: Bucket) -> list[Evictable]:
    tier, gradient = reducer.tier_of(bucket), reducer.gradient(bucket)
    return [tier.evictable(gradient)] if tier is not None and gradient is not None else []
