"""The front door: ``initialize`` and its kin."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, Dataset

from .accelerator import get_accelerator
from .checkpoint.activations import checkpointing
from .comm import init_distributed
from .comm.agreement import on_all_ranks
from .comm.communicator import Communicator
from .config import ConfigError, DeepSpeedConfig, load_config
from .engine.build import OptimizerArgument, OptimizerRequest, build_lr_scheduler, shard_model
from .engine.engine import DeepSpeedEngine
from .engine.loader import ResumableSampler
from .engine.parts import EngineParts
from .engine.precision import PrecisionPolicy
from .logs import log_dist, logger
from .monitor.monitor import MonitorMaster
from .version import __version__
from .zero.optimizer import ShardedOptimizer


def initialize(
    args: argparse.Namespace | None = None,
    model: nn.Module | None = None,
    optimizer: OptimizerArgument = None,
    model_parameters: Iterable[Any] | None = None,
    training_data: Dataset[Any] | None = None,
    lr_scheduler: Any = None,
    distributed_port: int = 29500,
    dist_init_required: bool | None = None,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    config: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    config_params: str | os.PathLike[str] | Mapping[str, Any] | None = None,
) -> tuple[DeepSpeedEngine, ShardedOptimizer | None, Any, Any]:
    """Wrap ``model`` for training: returns ``(engine, optimizer, training dataloader, lr scheduler)``.

    The configuration is ``config`` (or ``config_params``, or ``args.deepspeed_config``): a path, dictionary, JSON
    string or base64 of one. ``optimizer`` is a torch optimizer or a callable that makes one from parameters; without
    it the configuration's is built over ``model_parameters`` (all of the model's where None; frozen ones are trained from
    when they are unfrozen). ``lr_scheduler`` is a
    scheduler or a callable that makes one from the optimizer. Called on every rank, with the same model.
    """
    if model is None:
        raise ValueError("deepspeed.initialize needs a model")
    source = config if config is not None else config_params
    if source is None:
        source = getattr(args, "deepspeed_config", None)
    if source is None:
        raise ValueError("deepspeed.initialize needs a configuration: config=..., or args.deepspeed_config")
    if dist_init_required is not False:
        init_distributed(distributed_port=distributed_port)
    communicator = Communicator()
    settings = on_all_ranks(
        lambda: load_config(source, world_size=communicator.size),
        communicator,
        what="reading the configuration",
        error=ConfigError,
    )
    if settings.zero_optimization.enable_sanity_checks:
        communicator = communicator.checked()
    _announce(settings, communicator)
    if settings.gives("activation_checkpointing"):
        checkpointing.configure(None, deepspeed_config=settings)
    precision = PrecisionPolicy.from_config(settings)
    device = _device(args)
    model.to(device)
    sharded_model, sharded = shard_model(
        model,
        OptimizerRequest(optimizer, model_parameters),
        config=settings,
        precision=precision,
        communicator=communicator,
    )
    scheduler = build_lr_scheduler(lr_scheduler, sharded, settings)
    loader = _dataloader(training_data, settings, communicator, collate_fn) if training_data is not None else None
    monitor = MonitorMaster(settings, rank=communicator.rank)
    parts = EngineParts(settings, communicator, precision, sharded_model, sharded, scheduler, loader, device, monitor)
    return DeepSpeedEngine(model, parts), sharded, loader, scheduler


def add_config_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add ``--deepspeed``, ``--deepspeed_config`` and ``--local_rank`` to a script's parser."""
    group = parser.add_argument_group("DeepSpeed", "DeepSpeed configuration")
    group.add_argument("--deepspeed", action="store_true", help="enable DeepSpeed")
    group.add_argument("--deepspeed_config", default=None, help="path of a ds_config.json")
    group.add_argument("--local_rank", type=int, default=-1, help="rank on this host, set by the launcher")
    return parser


def _announce(config: DeepSpeedConfig, communicator: Communicator) -> None:
    if config.log_level is not None:
        logger.setLevel(config.log_level.upper())
    zero, sizes = config.zero_optimization, f"{config.train_batch_size} samples per step"
    log_dist(f"DeepSpeed info: version={__version__}, ZeRO stage {zero.stage}, {communicator.size} ranks, {sizes}", [0])
    if config.dump_state:
        log_dist(f"configuration:\n{config.model_dump_json(indent=2)}", [0])


def _device(args: argparse.Namespace | None) -> torch.device:
    accelerator = get_accelerator()
    if accelerator.kind != "cpu":
        index = getattr(args, "device_rank", None)
        accelerator.set_device(dist.get_node_local_rank(fallback_rank=0) if index is None else index)
    return torch.device(accelerator.current_device_name())


def _dataloader(
    data: Dataset[Any],
    config: DeepSpeedConfig,
    communicator: Communicator,
    collate_fn: Callable[[list[Any]], Any] | None,
) -> DataLoader[Any]:
    return DataLoader(
        data,
        batch_size=config.train_micro_batch_size_per_gpu,
        sampler=ResumableSampler(data, communicator.size, communicator.rank),
        collate_fn=collate_fn,
        drop_last=config.dataloader_drop_last,
    )
