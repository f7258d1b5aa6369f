"""What a ZeRO stage shards: the one place where a stage number has a meaning."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ZeroPolicy:
    """Which of the model states each rank keeps only its slice of.

    Source: Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models" (2020), section 5.
    """

    shard_optimizer: bool
    shard_gradients: bool
    shard_parameters: bool

    @staticmethod
    def for_stage(stage: int) -> ZeroPolicy:
        """The policy of ZeRO stage 0, 1, 2 or 3."""
        return ZeroPolicy(shard_optimizer=stage >= 1, shard_gradients=stage >= 2, shard_parameters=stage >= 3)

    @property
    def stage(self) -> int:
        """The stage number of this policy, for reports and checkpoints."""
        return int(self.shard_optimizer) + int(self.shard_gradients) + int(self.shard_parameters)
