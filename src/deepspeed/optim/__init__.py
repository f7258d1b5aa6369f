"""Optimizers, learning-rate schedules and loss scaling, and how an optimizer steps over flat slices."""

from __future__ import annotations

from .adagrad import Adagrad
from .adam import Adam, AdamW
from .factory import build_optimizer, split_parameter_groups
from .lamb import Lamb
from .lion import Lion
from .loss_scaling import DynamicLossScaler, LossScaler, NoLossScaler, StaticLossScaler
from .muon import Muon
from .schedules import (
    VALID_LR_SCHEDULES,
    LRRangeTest,
    OneCycle,
    Schedule,
    WarmupCosineLR,
    WarmupDecayLR,
    WarmupLR,
    build_scheduler,
)
from .segments import FlatShard, Segment, Segments
from .sharding import ShardUpdate, Stepper, has_stepped, make_stepper, refuse_all_at_once, refuse_unsuited

__all__ = [
    "VALID_LR_SCHEDULES",
    "Adagrad",
    "Adam",
    "AdamW",
    "DynamicLossScaler",
    "FlatShard",
    "LRRangeTest",
    "Lamb",
    "Lion",
    "LossScaler",
    "Muon",
    "NoLossScaler",
    "OneCycle",
    "Schedule",
    "Segment",
    "Segments",
    "ShardUpdate",
    "StaticLossScaler",
    "Stepper",
    "WarmupCosineLR",
    "WarmupDecayLR",
    "WarmupLR",
    "build_optimizer",
    "build_scheduler",
    "has_stepped",
    "make_stepper",
    "refuse_all_at_once",
    "refuse_unsuited",
    "split_parameter_groups",
]
