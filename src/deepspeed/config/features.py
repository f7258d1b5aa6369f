"""Sections of parallelism, checkpoints, data, compilation and the other features."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from .section import Int, OpenSection, Section


class TensorParallelConfig(OpenSection):
    """Tensor parallelism."""

    autotp_size: Int = Field(0, ge=0, description="Ranks over which layers are split; 0 or 1 for none.")


class HybridEngineConfig(OpenSection):
    """Training and generation with one engine."""


class ActivationCheckpointingConfig(Section):
    """Activation checkpointing through ``deepspeed.checkpointing``."""

    partition_activations: bool = Field(False, description="Split saved activations over tensor-parallel ranks.")
    cpu_checkpointing: bool = Field(False, description="Keep saved activations in CPU memory.")
    contiguous_memory_optimization: bool = Field(False, description="Keep saved activations in one buffer.")
    number_checkpoints: Int | None = Field(None, description="Checkpoints per forward.")
    synchronize_checkpoint_boundary: bool = Field(False, description="Synchronize the device at each checkpoint.")
    profile: bool = Field(False, description="Time each checkpoint.")


class CheckpointConfig(Section):
    """Saving and loading."""

    tag_validation: Literal["Ignore", "Warn", "Fail", "IGNORE", "WARN", "FAIL", "ignore", "warn", "fail"] = Field(
        "Warn", description="What to do where ranks save under different tags."
    )
    load_universal: bool = Field(False, description="Load at another world size or stage: always possible.")
    use_node_local_storage: bool = Field(False, description="Every host has its own copy of the directory.")
    parallel_write: dict[str, Any] = Field(default_factory=dict, description="All ranks write at once: always so.")


class CompileConfig(OpenSection):  # type: ignore[no-redef]  # the plugin's __init__ has a **kwargs besides
    """Compile the model by torch.compile when the engine is made."""

    backend: str = Field("inductor", description="The backend of torch.compile.")
    kwargs: dict[str, Any] = Field(default_factory=dict, description="Further keyword arguments of torch.compile.")
    deepcompile: bool = Field(False, description="DeepCompile.")


class PipelineConfig(OpenSection):
    """Pipeline parallelism."""


class DataSection(OpenSection):
    """Curricula, sampling and routing of data."""


class FeatureSection(OpenSection):
    """A feature with a switch."""
