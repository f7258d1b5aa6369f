"""Where the inputs of a checkpoint wait for its backward.

- *input*: a tensor among the arguments of the function that is recomputed.
- *activation*: an input that requires a gradient and is no parameter. Only activations are moved: inputs without a
  gradient (masks, positions, token ids) are mostly one tensor that all checkpoints share, of which a part or copy for each
  would cost memory.
- *kept*: the elements of an activation in logical order, or this rank's slice of them, on a device and perhaps in a row of
  a buffer. In backward the activation is made of it again, with its strides: other strides can mean other kernels and
  other bits.
"""

from __future__ import annotations

import itertools
import weakref
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ...comm.communicator import Communicator
from .buffers import InputBuffers, InputKind

CPU = torch.device("cpu")
SAMPLES = 16
"""Elements by which ranks compare an activation."""


@dataclass(frozen=True)
class Untouched:
    """An input that stays as it is, at the version that counts changes in place."""

    value: Tensor
    version: int


@dataclass(frozen=True)
class Kept:
    """``elements`` is 1-D: all of the activation's, or where ``split`` this rank's slice. The rest is the activation's."""

    elements: Tensor
    split: bool
    shape: torch.Size
    stride: tuple[int, ...]
    device: torch.device


class InputStore:
    """Keeps the activations of checkpoints: split over the ranks of ``communicator``, which all have the same ones, where
    there is one; on CPU with ``on_cpu``; in ``buffers`` where there are some."""

    def __init__(
        self, *, communicator: Communicator | None = None, on_cpu: bool = False, buffers: InputBuffers | None = None
    ):
        self._communicator = communicator
        self._on_cpu = on_cpu
        self._buffers = buffers
        self._compared = False

    def hooks(self) -> saved_tensors_hooks:
        """The context for one checkpoint: what it saves is kept here until its backward asks for it."""
        positions = itertools.count()
        return saved_tensors_hooks(lambda value: self._keep(value, next(positions)), self._restore)

    def release_buffers(self) -> None:
        """Make new buffers at the next checkpoint. What the present ones hold stays valid."""
        if self._buffers is not None:
            self._buffers.release()

    def _keep(self, value: Tensor, position: int) -> Kept | Untouched:
        device = CPU if self._on_cpu else value.device
        split = self._communicator is not None and value.numel() >= self._communicator.size
        moved = split or self._buffers is not None or device != value.device
        if not (moved and _is_activation(value)):
            return Untouched(value, value._version)
        elements = value.detach().reshape(-1)
        row_numel = elements.numel()
        if split and self._communicator is not None:
            self._compare(value, self._communicator)
            row_numel = slice_numel(row_numel, self._communicator.size)
            elements = elements[self._communicator.rank * row_numel :][:row_numel]
        pinned = device != value.device
        if self._buffers is None:
            place = torch.empty(elements.numel(), dtype=value.dtype, device=device, pin_memory=pinned)
            return Kept(_put(elements, place), split, value.shape, value.stride(), value.device)
        row, give_back = self._buffers.lend(row_numel, InputKind(position, value.dtype, device), pinned=pinned)
        kept = Kept(_put(elements, row[: elements.numel()]), split, value.shape, value.stride(), value.device)
        # Autograd lets go of what it saved when backward is done with it, and when the graph goes without a backward.
        weakref.finalize(kept, give_back).atexit = False
        return kept

    def _restore(self, saved: Kept | Untouched) -> Tensor:
        if isinstance(saved, Untouched):
            if saved.value._version != saved.version:
                raise RuntimeError(
                    f"an input of a checkpoint, of shape {tuple(saved.value.shape)}, was changed in place before backward "
                    "could recompute from it: give the checkpoint a clone, or change a clone"
                )
            return saved.value
        elements = self._gathered(saved) if saved.split else saved.elements.to(saved.device, non_blocking=True, copy=True)
        values = elements.view(saved.shape)
        if values.stride() == saved.stride:
            return values
        strided = torch.empty_strided(saved.shape, saved.stride, dtype=values.dtype, device=values.device)
        return strided.copy_(values)

    def _gathered(self, saved: Kept) -> Tensor:
        """All elements of an activation of which each rank kept a slice."""
        communicator = self._communicator
        assert communicator is not None, "what is split has ranks that it is split over"
        numel = saved.shape.numel()
        each = slice_numel(numel, communicator.size)
        whole = torch.empty(communicator.size * each, dtype=saved.elements.dtype, device=saved.device)
        own = whole[communicator.rank * each :][: saved.elements.numel()]
        own.copy_(saved.elements, non_blocking=True)
        # As bytes, because not every backend sends every dtype.
        communicator.all_gather(whole.view(torch.uint8)).wait()
        return whole[:numel]

    def _compare(self, value: Tensor, communicator: Communicator) -> None:
        """Once, compare an activation among the ranks: slices of different ones would make a wrong one, silently."""
        if self._compared:
            return
        self._compared = True
        elements = value.detach().reshape(-1)
        sample = elements[:: -(-elements.numel() // SAMPLES)].cpu()
        found = communicator.gather_objects((tuple(value.shape), value.dtype, sample))
        for rank, (shape, dtype, other) in enumerate(found):
            alike = (shape, dtype) == (tuple(value.shape), value.dtype)
            if not (alike and torch.allclose(sample, other, rtol=1e-2, atol=1e-3, equal_nan=True)):
                raise ValueError(
                    "partition_activations splits activations that are the same on all model-parallel ranks; found "
                    f"different ones: {dtype} {list(shape)} on model-parallel rank {rank}, {value.dtype} "
                    f"{list(value.shape)} with other values on rank {communicator.rank}. Ranks that train on different "
                    "data are data-parallel: give configure() an mpu whose group leaves them out, or set it to false"
                )


def slice_numel(numel: int, ranks: int) -> int:
    """Elements of each rank's slice of ``numel``; the last slices may be shorter, or empty."""
    return -(-numel // ranks)


def _put(elements: Tensor, place: Tensor) -> Tensor:
    return place.copy_(elements, non_blocking=True)


def _is_activation(value: Tensor) -> bool:
    plain = value.layout is torch.strided and not isinstance(value, nn.Parameter)
    return plain and value.requires_grad and not _overlaps(value)


def _overlaps(value: Tensor) -> bool:
    """Whether elements may share memory, as those of an expanded tensor do: copies of them would need more of it."""
    reach = 0
    for stride, size in sorted(zip(value.stride(), value.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += stride * (size - 1)
    return False
