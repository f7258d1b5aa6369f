"""Sections ``tensorboard``, ``wandb``, ``comet``, ``csv_monitor``, ``flops_profiler``, ``comms_logger``, ``timers``."""

from __future__ import annotations

from pydantic import Field

from .section import Int, Section


class TensorBoardConfig(Section):
    """Write events for TensorBoard."""

    enabled: bool = Field(False, description="Write events.")
    output_path: str = Field("", description="Directory; runs/tensorboard where empty.")
    job_name: str = Field("DeepSpeedJobName", description="Subdirectory of this run.")


class WandbConfig(Section):
    """Log to Weights & Biases."""

    enabled: bool = Field(False, description="Log.")
    group: str | None = Field(None, description="Group of the run.")
    team: str | None = Field(None, description="Entity of the run.")
    project: str = Field("deepspeed", description="Project of the run.")


class CometConfig(Section):
    """Log to Comet."""

    enabled: bool = Field(False, description="Log.")
    samples_log_interval: Int = Field(100, ge=1, description="Samples between two logged values.")
    project: str | None = Field(None, description="Project of the experiment.")
    workspace: str | None = Field(None, description="Workspace of the experiment.")
    api_key: str | None = Field(None, description="Comet's key; COMET_API_KEY where absent.")
    experiment_name: str | None = Field(None, description="Name of the experiment.")
    experiment_key: str | None = Field(None, description="Key of the experiment.")
    online: bool | None = Field(None, description="Send at once, or keep for later.")
    mode: str | None = Field(None, description="get, create or get_or_create.")


class CsvConfig(Section):
    """Write one CSV file per value."""

    enabled: bool = Field(False, description="Write files.")
    output_path: str = Field("", description="Directory; runs/csv where empty.")
    job_name: str = Field("DeepSpeedJobName", description="Subdirectory of this run.")


class FlopsProfilerConfig(Section):
    """Profile one training step: operations, parameters and time per module."""

    enabled: bool = Field(False, description="Profile.")
    recompute_fwd_factor: float = Field(0.0, ge=0, description="1 where activation checkpointing recomputes forward.")
    profile_step: Int = Field(1, ge=0, description="Optimizer steps before the one that is profiled: the first is slow.")
    module_depth: Int = Field(-1, description="Depth to which modules are shown; -1 for all.")
    top_modules: Int = Field(1, ge=1, description="Modules shown per depth in the aggregated profile.")
    detailed: bool = Field(True, description="Print the table of all modules.")
    output_file: str | None = Field(None, description="File to print to; standard output where absent.")


class CommsLoggerConfig(Section):
    """Log volumes and times of collectives."""

    enabled: bool = Field(False, description="Print the table of collectives at the end.")
    verbose: bool = Field(False, description="Print the table at every reported step.")
    prof_all: bool = Field(True, description="Show all operations.")
    debug: bool = Field(False, description="Record callers.")
    prof_ops: list[str] = Field(
        default_factory=list, description="Operations to show where prof_all is false: all_reduce, reduce_scatter ..."
    )


class TimersConfig(Section):
    """The throughput timer."""

    enabled: bool = Field(True, description="Time steps.")
    synchronized: bool = Field(True, description="Synchronize the device before reading the clock.")


class ThroughputTimersConfig(Section):
    """Section ``timers``."""

    throughput: TimersConfig = TimersConfig()
