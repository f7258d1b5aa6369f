"""Which of a model's states lie on a tier below memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from ..memory.layout import Bucket
from ..memory.tiers import Evictable, FileTier


@dataclass(frozen=True)
class Tiers:
    """The tier of ``parameters`` (the slices of units) and of ``states`` (masters and the optimizer's); None is memory."""

    parameters: FileTier | None = None
    states: FileTier | None = None

    def of(self, bucket: Bucket, own: Tensor, master: Tensor) -> list[Evictable]:
        """What of a bucket's slice ``own`` and of its ``master`` lies below memory."""
        found = []
        if self.parameters is not None and bucket.unit is not None and own.numel():
            found.append(self.parameters.evictable(own))
        if self.states is not None and master is not own and master.numel():
            found.append(self.states.evictable(master))
        return found

    def of_states(self, states: Iterable[Mapping[str, object]]) -> list[Evictable]:
        """What of an optimizer's ``states`` lies below memory: the tensors of a value per element."""
        if self.states is None:
            return []
        values = [value for state in states for value in state.values()]
        return [self.states.evictable(v) for v in values if isinstance(v, Tensor) and v.dim() and v.numel()]


IN_MEMORY = Tiers()
"""No state lies anywhere else."""
