"""Sections ``checkpoint``, ``activation_checkpointing``, ``nebula`` and ``datastates_ckpt``."""

from __future__ import annotations

from typing import Annotated, Literal

from .section import Int, Lowered, OpenSection, Section, key


class ParallelWriteConfig(Section):
    """Which ranks write a checkpoint."""

    pipeline_stage: bool = key(False, "All pipeline stages write: every rank does here, either value is right.")


class CheckpointConfig(Section):
    """Saving and loading."""

    tag_validation: Annotated[Literal["ignore", "warn", "fail"], Lowered] = key(
        "warn", "What happens where ranks save under different tags: ignore, warn or fail, in any case."
    )
    load_universal: bool = key(False, "Load at another world size or stage: always possible here, either value is right.")
    use_node_local_storage: bool = key(False, "Every host has a directory of its own.")
    parallel_write: ParallelWriteConfig = ParallelWriteConfig()


class ActivationCheckpointingConfig(Section):
    """Activation checkpointing by ``deepspeed.checkpointing``."""

    partition_activations: bool = key(False, "Split saved activations over tensor-parallel ranks.")
    cpu_checkpointing: bool = key(False, "Keep saved activations in CPU memory.")
    contiguous_memory_optimization: bool = key(False, "Keep saved activations in one buffer.")
    number_checkpoints: Int | None = key(None, "Checkpoints of a forward, to size that buffer.", unit="checkpoints", ge=1)
    synchronize_checkpoint_boundary: bool = key(False, "Synchronize the device at each checkpoint.")
    profile: bool = key(False, "Time each checkpoint.")


class NebulaConfig(Section):
    """Checkpoints through Nebula."""

    enabled: bool = key(False, "Save through Nebula.")
    persistent_storage_path: str | None = key(None, "Where checkpoints last.")
    persistent_time_interval: Int = key(100, "Time between two that last.", unit="seconds", ge=1)
    num_of_version_in_retention: Int = key(2, "Checkpoints kept.", unit="checkpoints", ge=1)
    enable_nebula_load: bool = key(True, "Load through Nebula.")
    load_path: str | None = key(None, "Where to load from.")


class DataStatesConfig(OpenSection):
    """Checkpoints through DataStates; its other keys are DataStates'. On where the section has any key."""

    enabled: bool = key(True, "false switches it off.")
