"""Sections ``tensorboard``, ``wandb``, ``comet``, ``csv_monitor``, ``flops_profiler``, ``comms_logger``, ``timers``."""

from __future__ import annotations

from .section import Int, Real, Section, key


class TensorBoardConfig(Section):
    """Write events for TensorBoard."""

    enabled: bool = key(False, "Write events.")
    output_path: str = key("", "Directory; runs/tensorboard where empty.")
    job_name: str = key("DeepSpeedJobName", "Subdirectory of this run.")


class WandbConfig(Section):
    """Log to Weights & Biases."""

    enabled: bool = key(False, "Log.")
    group: str | None = key(None, "Group of the run.")
    team: str | None = key(None, "Entity of the run.")
    project: str = key("deepspeed", "Project of the run.")


class CometConfig(Section):
    """Log to Comet."""

    enabled: bool = key(False, "Log.")
    samples_log_interval: Int = key(100, "How often a value is logged.", unit="samples", ge=1)
    project: str | None = key(None, "Project of the experiment.")
    workspace: str | None = key(None, "Workspace of the experiment.")
    api_key: str | None = key(None, "Comet's key; COMET_API_KEY where absent.")
    experiment_name: str | None = key(None, "Name of the experiment.")
    experiment_key: str | None = key(None, "Key of the experiment.")
    online: bool | None = key(None, "Send at once, or keep for later.")
    mode: str | None = key(None, "get, create or get_or_create.")


class CsvConfig(Section):
    """Write one CSV file per value."""

    enabled: bool = key(False, "Write files.")
    output_path: str = key("", "Directory; runs/csv where empty.")
    job_name: str = key("DeepSpeedJobName", "Subdirectory of this run.")


class FlopsProfilerConfig(Section):
    """Profile one training step: operations, parameters and time per module."""

    enabled: bool = key(False, "Profile.")
    recompute_fwd_factor: Real = key(0.0, "1 where activation checkpointing recomputes forward.", unit="forwards", ge=0)
    profile_step: Int = key(
        1, "Optimizer steps before the one that is profiled: the first is slow.", unit="optimizer steps", ge=0
    )
    module_depth: Int = key(-1, "Depth to which modules are shown; -1 for all.", unit="levels")
    top_modules: Int = key(1, "Modules shown per depth in the aggregated profile.", unit="modules", ge=1)
    detailed: bool = key(True, "Print the table of all modules.")
    output_file: str | None = key(None, "File to print to; standard output where absent.")


class CommsLoggerConfig(Section):
    """Log volumes and times of collectives."""

    enabled: bool = key(False, "Print the table of collectives at the end.")
    verbose: bool = key(False, "Print the table at every reported step.")
    prof_all: bool = key(True, "Show all operations.")
    debug: bool = key(False, "Record callers.")
    prof_ops: list[str] = key([], "Operations to show where prof_all is false: all_reduce, reduce_scatter ...")


class TimersConfig(Section):
    """The throughput timer."""

    enabled: bool = key(True, "Time steps.")
    synchronized: bool = key(True, "Synchronize the device before reading the clock.")


class ThroughputTimersConfig(Section):
    """Timers that run along."""

    throughput: TimersConfig = TimersConfig()


class MonitorConfig(Section):
    """The sections of all monitors, for those who use monitors without an engine."""

    tensorboard: TensorBoardConfig = TensorBoardConfig()
    wandb: WandbConfig = WandbConfig()
    comet: CometConfig = CometConfig()
    csv_monitor: CsvConfig = CsvConfig()
