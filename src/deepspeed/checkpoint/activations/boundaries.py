"""What is done where the forward and the backward of a checkpoint begin and end: wait for the device, take the time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.autograd.graph import register_multi_grad_hook

from ...accelerator import get_accelerator
from ...logs import log_dist


@dataclass(frozen=True)
class Boundaries:
    """``synchronize`` waits for the device at each boundary; ``profile`` does so too, and logs the time between two."""

    synchronize: bool = False
    profile: bool = False

    @property
    def observed(self) -> bool:
        """Whether anything is done at a boundary."""
        return self.synchronize or self.profile

    @contextmanager
    def forward(self) -> Iterator[None]:
        """The forward of a checkpoint."""
        if not self.observed:
            yield
            return
        start = self._cross()
        yield
        self._report("forward", start)

    def expect_backward(self, inputs: Any, outputs: Any) -> None:
        """Watch for the backward of a checkpoint, recomputation included: from the first gradient of its ``outputs`` to
        the last of its ``inputs`` (nested tuples, lists and dicts). Without an input that requires one, backward has no
        end that could be seen."""
        if not self.observed:
            return
        leaving, entering = list(_with_gradients(outputs)), list(_with_gradients(inputs))
        if not (leaving and entering):
            return
        starts: list[float] = []

        def begin(gradient: Tensor) -> None:
            starts.append(self._cross())

        def end(gradients: Any) -> None:
            if starts:
                self._report("backward", starts[-1])
            for handle in handles:
                handle.remove()

        # Handles of leaves would otherwise stay for as long as the leaf.
        handles = [
            register_multi_grad_hook(leaving, begin, mode="any"),
            register_multi_grad_hook(entering, end, mode="all"),
        ]

    def _cross(self) -> float:
        get_accelerator().synchronize()
        return time.perf_counter()

    def _report(self, part: str, start: float) -> None:
        milliseconds = 1e3 * (self._cross() - start)
        if self.profile:
            log_dist(f"activation checkpoint: {part} {milliseconds:.2f} ms", [0])


def _with_gradients(item: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and dicts that require a gradient."""
    if isinstance(item, Tensor):
        if item.requires_grad:
            yield item
    elif isinstance(item, dict):
        yield from _with_gradients(list(item.values()))
    elif isinstance(item, (list, tuple)):
        for part in item:
            yield from _with_gradients(part)
