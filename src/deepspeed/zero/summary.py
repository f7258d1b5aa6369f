"""What all ranks must agree on before a step: one small all-gather at the accumulation boundary."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from ..comm.communicator import Communicator


@dataclass(frozen=True)
class GradientSummary:
    """The reduced gradients, seen from all ranks: their norm, whether they are finite, and the parameters and buckets
    that need care."""

    squared_norm: float
    finite: bool
    unfrozen: bool
    late: tuple[bool, ...]
    used: tuple[bool, ...]

    @property
    def norm(self) -> float:
        """The 2-norm over all parameters, to 24 bits: its last bits in fp64 depend on how slices are cut, and with them
        what clipping does would depend on the stage."""
        if not 0 <= self.squared_norm < math.inf:
            return self.squared_norm if self.squared_norm > 0 else math.nan
        mantissa, exponent = math.frexp(math.sqrt(self.squared_norm))
        return math.ldexp(round(mantissa * 2**24), exponent - 24)


def summarize(
    squared_norms: Iterable[tuple[float, bool]],
    *,
    late: Sequence[bool],
    used: Sequence[bool],
    unfrozen: bool,
    counts: bool,
    communicator: Communicator,
    device: torch.device,
) -> GradientSummary:
    """Combine every rank's view of the gradients.

    ``squared_norms`` are those of this rank's slices, with whether they are finite; they enter the norm where ``counts``
    (with whole gradients on every rank only one rank counts). ``late`` has one flag per bucket, ``used`` one per parameter;
    ``unfrozen`` says whether a parameter without a place has a gradient. Sums run in rank order in fp64, so all ranks get
    the same bits.
    """
    squared, finite = 0.0, True
    if counts:
        for part, part_finite in squared_norms:
            squared += part
            finite = finite and part_finite
    flags = [float(flag) for flag in (not finite, unfrozen, *late, *used)]
    # A sum with an infinity or NaN would spread to the flags of nobody: they are separate elements.
    mine = torch.tensor([squared, *flags], dtype=torch.float64)
    total = communicator.sum_in_rank_order(mine.to(device), purpose="agreement on the gradient norm").tolist()
    seen = [value > 0 for value in total[1:]]
    return GradientSummary(
        squared_norm=total[0],
        finite=not seen[0],
        unfrozen=seen[1],
        late=tuple(seen[2 : 2 + len(late)]),
        used=tuple(seen[2 + len(late) :]),
    )
