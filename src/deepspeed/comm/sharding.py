"""Who shards over whom.

Ranks that hold one copy of the states together, a slice each, are *shards*. Where they are fewer than all (MiCS), the others
form groups like theirs: ranks with the same slice are *replicas* of each other. Shards on one machine, say, may be *nearby*:
they keep a second copy of what was gathered last, a slice each, and gather it again from each other alone (ZeRO++ hpZ).

Sources: Zhang et al., "MiCS: Near-linear Scaling for Training Gigantic Model on Public Cloud" (2022), section 3; Wang et al.,
"ZeRO++: Extremely Efficient Collective Communication for Giant Model Training" (2023), section 3.2.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from .communicator import Communicator
from .operations import Deferred, Pending


@dataclass(frozen=True)
class ShardGroups:
    """``everyone`` are the data-parallel ranks, ``shards`` those of this rank's copy; ``replicas`` those that have this
    rank's slice, None where there is one copy. ``nearby`` are those of a second copy, None where there is none."""

    everyone: Communicator
    shards: Communicator
    replicas: Communicator | None = None
    nearby: Communicator | None = None

    @staticmethod
    def whole(everyone: Communicator) -> ShardGroups:
        """One copy, a slice on each rank."""
        return ShardGroups(everyone, everyone)

    @staticmethod
    def of_size(everyone: Communicator, size: int) -> ShardGroups:
        """A copy on each ``size`` consecutive ranks, of which ``everyone`` is a multiple. Called on all ranks."""
        if size == everyone.size:
            return ShardGroups.whole(everyone)
        ranks = range(everyone.size)
        shards = everyone.split([ranks[first : first + size] for first in ranks[::size]])
        replicas = everyone.split([ranks[shard::size] for shard in range(size)])
        return ShardGroups(everyone, shards, replicas)

    def with_second_copy(self, size: int) -> ShardGroups:
        """The same, with a second copy on each ``size`` consecutive shards. Called on all ranks."""
        if size == self.shards.size:
            return self
        ranks = range(self.everyone.size)
        return replace(self, nearby=self.everyone.split([ranks[first : first + size] for first in ranks[::size]]))

    @property
    def is_first_copy(self) -> bool:
        """Whether this rank's slices count where each element is to count once."""
        return self.replicas is None or self.replicas.rank == 0

    def duplicate(self) -> ShardGroups:
        """The same, with shards in a process group of their own. Called on all ranks."""
        return replace(self, shards=self.shards.duplicate())

    def close(self) -> None:
        """Take the groups of a ``duplicate`` apart, and of its second copy."""
        self.shards.close()
        if self.nearby is not None:
            self.nearby.close()

    def unchecked(self) -> ShardGroups:
        """The same, which compare no more what they are about to do."""
        shards = self.shards.unchecked()
        return ShardGroups(
            shards if self.shards is self.everyone else self.everyone.unchecked(),
            shards,
            None if self.replicas is None else self.replicas.unchecked(),
        )

    def reduce_scatter(
        self, buffer: Tensor, *, out: Tensor | None = None, scale: float = 1.0, accumulate: bool = False, purpose: str = ""
    ) -> Pending:
        """Sum ``buffer`` over everyone: as :meth:`Communicator.reduce_scatter` does over the shards, then each slice over
        its replicas."""
        replicas = self.replicas
        if replicas is None:
            return self.shards.reduce_scatter(buffer, out=out, scale=scale, accumulate=accumulate, purpose=purpose)
        own = buffer.chunk(self.shards.size)[self.shards.rank]
        within = self.shards.reduce_scatter(buffer, scale=scale, purpose=purpose)

        def across() -> None:
            within.wait()
            replicas.all_reduce(own, purpose=purpose).wait()
            if out is not None:
                out.add_(own) if accumulate else out.copy_(own)

        return Deferred(across)

    def release_scratch(self) -> None:
        """Free the buffers in which reductions received."""
        self.everyone.release_scratch()
        self.shards.release_scratch()
