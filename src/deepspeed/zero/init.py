"""``deepspeed.zero.Init``: construct models that no single rank could hold."""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from ..accelerator import get_accelerator
from ..comm import init_distributed
from ..comm.communicator import Communicator
from .construction import ModuleSharder, SharderContext

if TYPE_CHECKING:
    from ..config import DeepSpeedConfig


class Init:
    """A context in which models are sharded while they are constructed, module by module; all ranks construct the same.

    ``module`` is a model that was constructed before: it is sharded at once. ``data_parallel_group`` are the ranks over
    which to shard, all where None. The precision and ``stage3_param_persistence_threshold`` come from
    ``config_dict_or_path`` (or ``config``), which may still hold "auto"; ``dtype`` overrides the precision. ``enabled``
    False does nothing. Parameters have rank 0's values. Several models may be made in one context; inside
    another one a context does nothing.

    ``remote_device`` is None or the device in use; "cpu" beside an accelerator and "nvme" are not built yet and are
    errors. ``pin_memory`` is for "cpu". ``mpu`` names the ranks by ``get_data_parallel_group()`` where
    ``data_parallel_group`` does not. No linear layer keeps a gathered weight alive, whatever ``mem_efficient_linear`` says.
    """

    def __init__(
        self,
        module: nn.Module | None = None,
        data_parallel_group: dist.ProcessGroup | None = None,
        mem_efficient_linear: bool = True,
        remote_device: str | None = None,
        pin_memory: bool = False,
        config_dict_or_path: str | os.PathLike[str] | Mapping[str, Any] | None = None,
        config: str | os.PathLike[str] | Mapping[str, Any] | None = None,
        enabled: bool = True,
        dtype: torch.dtype | None = None,
        mpu: Any = None,
    ):
        self._context: SharderContext | None = None
        if not enabled:
            return
        _refuse_other_tiers(remote_device, pin_memory)
        init_distributed()
        if data_parallel_group is None and mpu is not None:
            data_parallel_group = mpu.get_data_parallel_group()
        communicator = Communicator(data_parallel_group)
        settings = _settings(config_dict_or_path if config_dict_or_path is not None else config, communicator)
        sharder = ModuleSharder(
            communicator,
            dtype=dtype or _dtype(settings),
            resident_numel=settings.zero_optimization.stage3_param_persistence_threshold,
        )
        if module is not None:
            sharder.shard_all(module)
            sharder.finish()
        self._context = SharderContext(sharder)

    def __enter__(self) -> None:
        if self._context is not None:
            self._context.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._context is not None:
            self._context.__exit__(kind, error, traceback)


def _settings(source: str | os.PathLike[str] | Mapping[str, Any] | None, communicator: Communicator) -> DeepSpeedConfig:
    # Imported here: code that only gathers parameters imports this module too, and pays for pydantic in vain.
    from ..config.load import load_config

    return load_config(source if source is not None else {}, world_size=communicator.size)


def _dtype(config: DeepSpeedConfig) -> torch.dtype | None:
    return torch.float16 if config.fp16.enabled else torch.bfloat16 if config.bf16.enabled else None


def _refuse_other_tiers(remote_device: str | None, pin_memory: bool) -> None:
    here = get_accelerator().kind
    if remote_device not in (None, "none", here):
        raise ValueError(f"zero.Init(remote_device='{remote_device}') is not built yet: they stay on {here}; leave it out")
    if pin_memory and remote_device != "cpu":
        raise ValueError("zero.Init(pin_memory=True) is for remote_device='cpu'; leave it out")
