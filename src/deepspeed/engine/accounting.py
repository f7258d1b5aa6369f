"""Model-state bytes, measured from the storages that live now."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from ..memory.estimate import ModelStateBytes
from ..memory.packed import QuantizingTier
from ..zero.optimizer import ShardedOptimizer
from ..zero.sharding import ShardedModel


def measure_model_states(
    module: nn.Module, model: ShardedModel, optimizer: ShardedOptimizer | None
) -> ModelStateBytes:
    """Bytes of parameters, gradients, fp32 masters and optimizer states on this rank; each storage counts once."""
    seen: set[int] = set()
    second = [part.second for unit in model.scopes.fetcher.units for part in unit.parts if part.second is not None]
    parameters = _bytes([*module.parameters(), *model.trained.slices, *model.frozen.slices, *second], seen)
    if optimizer is None:
        return ModelStateBytes(parameters=parameters, gradients=0, master=0, optimizer=0)
    gradients = _bytes([t for kept in (True, False) for t in optimizer.reducer.buffers(kept=kept)], seen)
    gradients += _bytes((p.grad for p in module.parameters() if p.grad is not None), seen)
    split = [tensor for _, split in optimizer.flat.splits.values() for tensor in (split.low, split.ties)]
    master = _bytes([*optimizer.flat.masters, *split], seen)
    states = [t for tier in optimizer.flat.optimizer_tiers if isinstance(tier, QuantizingTier) for t in tier.tensors()]
    states += [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
    return ModelStateBytes(parameters=parameters, gradients=gradients, master=master, optimizer=_bytes(states, seen))


def _bytes(tensors: Iterable[Tensor], seen: set[int]) -> int:
    total = 0
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
    return total
