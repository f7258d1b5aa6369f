"""Buffers made once in which the inputs of checkpoints wait, one row for each checkpoint.

Allocated and freed in the midst of short-lived tensors, long-lived inputs would leave the device's memory in pieces.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class InputKind:
    """What has a buffer: the position of an argument, and dtype and device of what is kept of it."""

    position: int
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class _Buffer:
    """``rows`` is [checkpoints, elements]; ``free`` are the indices of those that are not lent."""

    rows: Tensor
    free: list[int]


class InputBuffers:
    """Lends rows. Of each kind of input at most ``checkpoints`` are lent at a time, all of one size."""

    def __init__(self, checkpoints: int):
        self._checkpoints = checkpoints
        self._buffers: dict[InputKind, _Buffer] = {}

    def lend(self, numel: int, kind: InputKind, *, pinned: bool = False) -> tuple[Tensor, Callable[[], None]]:
        """A row of ``numel`` elements, and the function that gives it back.

        Raises RuntimeError where all rows of the kind are lent, and where lent ones have another size.
        """
        buffer = self._buffer(numel, kind, pinned)
        if not buffer.free:
            raise RuntimeError(
                f"all {self._checkpoints} rows for argument {kind.position} of a checkpoint hold inputs that wait for their "
                "backward: set number_checkpoints to the checkpoints of all forwards under way, or, after forwards that "
                "have no backward, call deepspeed.checkpointing.reset()"
            )
        row = buffer.free.pop()
        return buffer.rows[row], lambda: buffer.free.append(row)

    def release(self) -> None:
        """Make new buffers at the next use. Rows that are lent stay valid."""
        self._buffers.clear()

    def _buffer(self, numel: int, kind: InputKind, pinned: bool) -> _Buffer:
        """The buffer of a kind; a new one where none of its rows is lent and sizes have changed, as with the last batch
        of an epoch."""
        buffer = self._buffers.get(kind)
        if buffer is not None and buffer.rows.shape[1] != numel and len(buffer.free) < self._checkpoints:
            raise RuntimeError(
                f"argument {kind.position} of a checkpoint has {numel} elements to keep, and {buffer.rows.shape[1]} in a "
                "checkpoint before it: contiguous_memory_optimization needs checkpoints whose inputs are of one size; "
                "switch it off"
            )
        if buffer is None or buffer.rows.shape[1] != numel:
            rows = torch.empty(self._checkpoints, numel, dtype=kind.dtype, device=kind.device, pin_memory=pinned)
            buffer = self._buffers[kind] = _Buffer(rows, list(reversed(range(self._checkpoints))))
        return buffer
