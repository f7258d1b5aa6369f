"""Where an engine's states go: to checkpoints and files and back, and off its device for a while."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..accelerator import get_accelerator
from ..logs import log_dist
from ..zero.offload_states import OffloadedStates
from ..zero.presence import OffloadDeviceEnum, OffloadStateTypeEnum
from .checkpointing import save_training_checkpoint
from .information import EngineInformation
from .parts import EngineParts
from .restoring import LoadRequest, load_training_checkpoint
from .weights import consolidated_state_dict, save_weights


class EngineStates(EngineInformation):
    """An engine whose states can be saved, loaded and taken away."""

    def __init__(self, module: nn.Module, parts: EngineParts):
        super().__init__(module, parts)
        self.offloaded = OffloadedStates(parts.model, parts.optimizer)

    def save_checkpoint(
        self,
        save_dir: str | Path,
        tag: str | None = None,
        client_state: Mapping[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """Save all states under ``save_dir/tag`` (``global_step<N>`` where None). Called on every rank.

        The checkpoint appears whole or not at all; ``latest`` names it afterwards where ``save_latest``.
        ``client_state`` (JSON-like values and tensors) comes back from ``load_checkpoint``. With
        ``exclude_frozen_parameters`` parameters that are not trained stay out: a load keeps the model's own. Returns
        True.
        """
        save_training_checkpoint(
            self,
            Path(save_dir),
            tag=str(tag) if tag is not None else f"global_step{self.global_steps}",
            client_state=dict(client_state or {}),
            save_latest=save_latest,
            exclude_frozen_parameters=exclude_frozen_parameters,
        )
        return True

    def load_checkpoint(
        self,
        load_dir: str | Path,
        tag: str | None = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        custom_load_fn: Callable[..., object] | None = None,
    ) -> tuple[str | None, dict[str, Any] | None]:
        """Load the checkpoint ``tag`` (the one that ``latest`` names where None), saved at any world size and stage.

        Returns its path and the client state, or ``(None, None)`` where ``load_dir`` has no checkpoint. A damaged
        one raises, and leaves the engine as it was. ``load_module_only`` leaves the counters as they are, too.
        ``custom_load_fn(src=state_dict, dst=module)`` loads the weights in place of the engine: ``src`` is the module's
        whole state dict on CPU (trained parameters in fp32), whatever this module's names and shapes are; the function
        writes into ``dst`` on every rank, and the fp32 masters follow. Optimizer states go by the parameters' names.
        """
        loaded = load_training_checkpoint(
            self,
            Path(load_dir),
            tag=str(tag) if tag is not None else None,
            request=LoadRequest(
                strict=load_module_strict,
                optimizer_states=load_optimizer_states and not load_module_only,
                scheduler_states=load_lr_scheduler_states and not load_module_only,
                counters=not load_module_only,
                load_module=custom_load_fn,
            ),
        )
        self._accumulation.start_over()
        return loaded

    def save_16bit_model(
        self,
        save_dir: str | Path,
        save_filename: str = "pytorch_model.bin",
        exclude_frozen_parameters: bool = False,
        max_shard_size: int | str | None = None,
    ) -> bool:
        """Write the model's weights alone, in its dtype, to ``save_dir/save_filename``: as safetensors where the name
        ends so, else as ``torch.save`` does; into several files with an index where they exceed ``max_shard_size`` ("5GB", or
        bytes). Called on every rank; rank 0 writes, and has one unit of a model at stage 3 at a time. Returns whether anything
        was saved: at stage 3 only where ``stage3_gather_16bit_weights_on_model_save`` allows to gather on rank 0."""
        if self.sharded_model.scopes.fetcher.units and not self.zero_gather_16bit_weights_on_model_save():
            wanted = "zero_optimization.stage3_gather_16bit_weights_on_model_save is false"
            log_dist(f"save_16bit_model saved nothing: stage 3 gathers no weights on rank 0 while {wanted}", [0])
            return False
        save_weights(
            Path(save_dir) / save_filename,
            self.module,
            self.sharded_model,
            self.communicator,
            exclude_frozen_parameters=exclude_frozen_parameters,
            max_shard_size=max_shard_size,
        )
        return True

    def _zero3_consolidated_16bit_state_dict(self, exclude_frozen_parameters: bool = False) -> OrderedDict[str, Tensor] | None:
        """The module's state dict on CPU on rank 0, None on the others. Integrations call it by this name."""
        return consolidated_state_dict(
            self.module,
            self.sharded_model,
            self.communicator,
            exclude_frozen_parameters=exclude_frozen_parameters,
        )

    _consolidated_16bit_state_dict = _zero3_consolidated_16bit_state_dict

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Load what ``state_dict`` of the module or of the engine returned; the fp32 masters follow."""
        if any(name in state_dict for name in self.module.state_dict()):
            result = self.module.load_state_dict(state_dict, *args, **kwargs)
        else:
            result = super().load_state_dict(state_dict, *args, **kwargs)
        if self.optimizer is not None:
            self.optimizer.flat.masters_from_parameters()
        return result

    def offload_states(
        self,
        include: Iterable[OffloadStateTypeEnum] | None = None,
        device: OffloadDeviceEnum = OffloadDeviceEnum.cpu,
        pin_memory: bool = True,
        non_blocking: bool = False,
    ) -> None:
        """Move the states ``include`` (all where None) to the CPU until ``reload_states``; who needs them meanwhile raises
        RuntimeError. States that are on the CPU stay where they are. Raises ValueError for another ``device``."""
        if OffloadDeviceEnum(device) is not OffloadDeviceEnum.cpu:
            raise ValueError(f"offload_states moves states to the device 'cpu', not to '{OffloadDeviceEnum(device).value}'")
        states = [OffloadStateTypeEnum(state) for state in (OffloadStateTypeEnum if include is None else include)]
        self.offloaded.offload(states, pin_memory=pin_memory, non_blocking=non_blocking)
        get_accelerator().empty_cache()

    def reload_states(self, non_blocking: bool = False) -> None:
        """Bring back what ``offload_states`` moved."""
        self.offloaded.reload(non_blocking=non_blocking)


def get_state_devices(model: EngineStates, state: OffloadStateTypeEnum) -> set[torch.device]:
    """The devices on which memory of the engine ``model``'s ``state`` is now; none where it has none."""
    return model.offloaded.devices(OffloadStateTypeEnum(state))
