"""Random samples on a CPU: torch's own, bit for bit, several times as fast.

torch draws a number after the other; the core draws a vector of them at once. What torch makes of the numbers differs
between its builds by the last bit, and may change with its version: so each kind of sample is compared with torch's when it is
first asked for, and where a bit differs torch draws.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .core import load as _load
from .kernels import DTYPE_CODES

LEAST_NUMEL = 1 << 12
"""Samples below which torch draws: it takes less time than to read and write the generator's state."""

DTYPES = (torch.float32, torch.bfloat16)

# Where a generator's state, 5056 bytes, has its fields: how many words are left, plus one; how many have been drawn; 624 words
# of 64 bits, each with 32 in use.
_LEFT, _NEXT, _WORDS = slice(8, 12), slice(16, 24), slice(24, 24 + 624 * 8)
_STATE_NBYTES = 5056


@dataclass(frozen=True)
class Samples:
    """Samples of one kind: "uniform" from ``first`` to ``second``, or "normal" of mean ``first`` and standard deviation
    ``second``. ``fused``: uniform ones with a multiply-add of one rounding."""

    kind: str
    first: float
    second: float
    fused: bool = False

    def by_torch(self, out: Tensor, generator: torch.Generator) -> None:
        """Fill ``out`` by torch's kernel."""
        draw = out.uniform_ if self.kind == "uniform" else out.normal_
        draw(self.first, self.second, generator=generator)

    def by_core(self, out: Tensor, generator: torch.Generator) -> None:
        """Fill ``out``, contiguous and of at least 16 elements, by the core's kernel."""
        core = _load()[0]
        assert core is not None, "whoever asks has looked whether there is a core"
        state = generator.get_state()
        arguments = {
            "words": state[_WORDS].data_ptr(),
            "next": 625 - int(state[_LEFT].view(torch.int32)),
            "out": out.data_ptr(),
            "dtype": DTYPE_CODES[out.dtype],
            "numel": out.numel(),
        }
        if self.kind == "uniform":
            drawn = core.uniform(**arguments, low=self.first, high=self.second, fused=self.fused)
        else:
            drawn = core.normal(**arguments, mean=self.first, deviation=self.second)
        state[_LEFT].view(torch.int32).fill_(625 - drawn)
        state[_NEXT].view(torch.int64).fill_(drawn)
        generator.set_state(state)


def uniform_(out: Tensor, low: float, high: float) -> bool:
    """Fill ``out`` as ``out.uniform_(low, high)`` does. Returns whether that was possible: if not, nothing happened."""
    if not (low <= high and math.isfinite(high - low)):
        return False
    return _fill(out, lambda fused: Samples("uniform", low, high, fused))


def normal_(out: Tensor, mean: float, deviation: float) -> bool:
    """Fill ``out`` as ``out.normal_(mean, deviation)`` does. Returns whether that was possible: if not, nothing happened."""
    if not (deviation >= 0 and math.isfinite(mean + deviation)):
        return False
    return _fill(out, lambda fused: Samples("normal", mean, deviation))


def _fill(out: Tensor, make: Callable[[bool], Samples]) -> bool:
    if out.device.type != "cpu" or out.dtype not in DTYPES or not out.is_contiguous() or out.numel() < LEAST_NUMEL:
        return False
    fused = _torchs_variant(make(False).kind, out.dtype)
    if fused is None:
        return False
    make(fused).by_core(out, torch.default_generator)
    return True


@functools.cache
def _torchs_variant(kind: str, dtype: torch.dtype) -> bool | None:
    """Whether torch's samples are those of the core with ``fused``, or those without; None where they are neither."""
    if _load()[0] is None:
        return None
    for fused in (True, False):
        # A size that no vector divides, and numbers whose sums and products are rounded.
        if _same(Samples(kind, -0.3, 0.5, fused), torch.empty(40_007, dtype=dtype)):
            return fused
    return None


def _same(samples: Samples, out: Tensor) -> bool:
    """Whether core and torch draw the same, from the same numbers, and come to the same state."""
    theirs, ours = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    if ours.get_state().numel() != _STATE_NBYTES:
        return False
    expected = torch.empty_like(out)
    for _ in range(2):
        samples.by_torch(expected, theirs)
        samples.by_core(out, ours)
        if not (torch.equal(out, expected) and torch.equal(ours.get_state(), theirs.get_state())):
            return False
    return True
