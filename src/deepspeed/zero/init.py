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
from .drawing import FastDraws
from .tiers import Tiers, open_tiers

if TYPE_CHECKING:
    from ..config import DeepSpeedConfig


class Init:
    """A context in which models are sharded while they are constructed, module by module; all ranks construct the same.

    ``module`` is a model that was constructed before: it is sharded at once. ``data_parallel_group`` are the ranks over
    which to shard, all where None. The precision and the stage3_*_persistence_threshold come from
    ``config_dict_or_path`` (or ``config``), which may still hold "auto"; ``dtype`` overrides the precision. ``enabled``
    False does nothing. Parameters have rank 0's values: those of plain construction, converted to the precision. Tensors
    are made on the accelerator in use. Several models may be made in one context; inside another one a context does
    nothing.

    ``remote_device`` "nvme", or ``offload_param`` in the configuration, has the slices in a file as soon as there are some;
    ``remote_device`` "nvme" takes the directory and the rest from ``offload_param``. Else it is None or the device in use;
    "cpu" beside an accelerator is not built yet and an error. ``pin_memory`` is for "cpu". ``mpu`` names the ranks by
    ``get_data_parallel_group()`` where ``data_parallel_group`` does not; ``sequence_data_parallel_group`` is another name
    for the latter. No linear layer keeps a gathered weight alive, whatever ``mem_efficient_linear`` says. What belongs to
    ZeRO++ (``zero_param_parallel_group``, ``zero_quantized_weights``, ``zero_quantized_nontrainable_weights``) and
    ``param_swapper`` are not built yet and are errors.
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
        zero_param_parallel_group: dist.ProcessGroup | None = None,
        zero_quantized_weights: bool = False,
        zero_quantized_nontrainable_weights: bool = False,
        sequence_data_parallel_group: dist.ProcessGroup | None = None,
        param_swapper: Any = None,
    ):
        self._context: SharderContext | None = None
        if not enabled:
            return
        _refuse_other_devices(remote_device, pin_memory)
        _refuse_unbuilt(
            zero_param_parallel_group=zero_param_parallel_group,
            zero_quantized_weights=zero_quantized_weights,
            zero_quantized_nontrainable_weights=zero_quantized_nontrainable_weights,
            param_swapper=param_swapper,
        )
        init_distributed()
        communicator = Communicator(_group(data_parallel_group, sequence_data_parallel_group, mpu))
        settings = _settings(config_dict_or_path if config_dict_or_path is not None else config, communicator)
        sharder = ModuleSharder(
            communicator,
            dtype=dtype or _dtype(settings),
            resident_numel=settings.zero_optimization.stage3_param_persistence_threshold,
            resident_total=settings.zero_optimization.stage3_model_persistence_threshold,
            tiers=_open_tiers(settings, remote_device),
        )
        if module is not None:
            sharder.shard(module)
            sharder.finish()
        here = get_accelerator()
        within = FastDraws() if here.kind == "cpu" else torch.device(here.current_device_name())
        self._context = SharderContext(sharder, [within])

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


def _group(given: dist.ProcessGroup | None, other: dist.ProcessGroup | None, mpu: Any) -> dist.ProcessGroup | None:
    if given is not None and other is not None:
        raise ValueError(
            "zero.Init has data_parallel_group and sequence_data_parallel_group, which are names of the same ranks: give one"
        )
    if given is None and other is None and mpu is not None:
        found: dist.ProcessGroup = mpu.get_data_parallel_group()
        return found
    return given if given is not None else other


def _refuse_unbuilt(**arguments: Any) -> None:
    for name, value in arguments.items():
        if value:
            raise ValueError(f"zero.Init({name}=...) is not built yet; leave it out")


def _open_tiers(settings: DeepSpeedConfig, remote_device: str | None) -> Tiers:
    device = settings.zero_optimization.offload_param.device
    if remote_device == "nvme" and device != "nvme":
        raise ValueError(
            f"zero.Init(remote_device='nvme') needs zero_optimization.offload_param.nvme_path in its configuration, whose "
            f"offload_param.device is {device}"
        )
    return open_tiers(settings)


def _refuse_other_devices(remote_device: str | None, pin_memory: bool) -> None:
    here = get_accelerator().kind
    if remote_device not in (None, "none", "nvme", here):
        raise ValueError(f"zero.Init(remote_device='{remote_device}') is not built yet: they stay on {here}; leave it out")
    if pin_memory and remote_device != "cpu":
        raise ValueError("zero.Init(pin_memory=True) is for remote_device='cpu'; leave it out")
