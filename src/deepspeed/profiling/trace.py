"""A forward and backward without memory: on fake tensors, which have shapes and no values, to count what they would take."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from ..memory.demand import Arrival, Trace


def trace_step(model: nn.Module, loss_of: Callable[[], Tensor]) -> Trace:
    """Run ``loss_of`` and its backward, within the fake tensor mode that ``model`` was made in, and count. Gradients are
    freed as soon as they are there, as buckets take them over."""
    live = _LiveBytes([*model.parameters(), *model.buffers()])
    arrivals: list[Arrival] = []

    def arrive(name: str, parameter: Tensor) -> None:
        arrivals.append(Arrival(name, live.take_peak()))
        parameter.grad = None

    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    hooks = [p.register_post_accumulate_grad_hook(partial(arrive, name)) for name, p in trained]
    try:
        with FlopCounterMode(display=False) as counter, live:
            loss_of().backward()
    finally:
        for hook in hooks:
            hook.remove()
    return Trace(tuple(arrivals), counter.get_total_flops())


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that operations make, until they are freed; those of ``known`` tensors are not counted."""

    def __init__(self, known: list[Tensor]):
        super().__init__()
        self._known = weakref.WeakSet(tensor.untyped_storage() for tensor in known)
        self._live = self._peak = 0

    def take_peak(self) -> int:
        """The most bytes since the last time."""
        peak, self._peak = self._peak, self._live
        return peak

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self._known:
                self._known.add(storage)
                self._live += storage.nbytes()
                self._peak = max(self._peak, self._live)
                weakref.finalize(storage, self._freed, storage.nbytes())
        return result

    def _freed(self, nbytes: int) -> None:
        self._live -= nbytes
