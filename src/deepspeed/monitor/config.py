"""The sections of the configuration that monitors read, under their documented names."""

from __future__ import annotations

from ..config.monitoring import CometConfig, TensorBoardConfig, WandbConfig
from ..config.monitoring import CsvConfig as CSVConfig
from ..config.monitoring import MonitorConfig as DeepSpeedMonitorConfig

__all__ = ["CSVConfig", "CometConfig", "DeepSpeedMonitorConfig", "TensorBoardConfig", "WandbConfig"]
