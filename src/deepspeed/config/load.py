"""From what the user wrote to a validated configuration."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from .batch import BATCH_KEYS, BatchSizes, explain_solution, solve_batch_sizes
from .errors import ConfigError, Problem, raise_problems
from .origin import Kind, Origin
from .plain import validation_problems
from .prepare import prepare
from .root import RootSection
from .source import read_source
from .unbuilt import unbuilt_problems
from .unknown import drop_unknown_keys


class DeepSpeedConfig(RootSection):
    """A configuration, read and validated: its keys are attributes, with the values that are in effect.

    ``config`` is a path, a mapping, a JSON string or base64 of one. Entries that are "auto" take the key's default, and
    batch sizes are solved for ``world_size`` data-parallel ranks: where None, those of ``mpu`` (anything with
    ``get_data_parallel_world_size()``), those along ``mesh_device``'s dimension ``data_parallel``, or else all of the
    default process group, 1 where there is none. Raises ConfigError with all problems found.
    """

    def __init__(
        self,
        config: str | os.PathLike[str] | Mapping[str, Any],
        mpu: Any = None,
        mesh_device: Any = None,
        *,
        world_size: int | None = None,
    ):
        raw, name = read_source(config)
        values = copy.deepcopy(raw)
        ranks = _data_parallel_size(mpu, mesh_device) if world_size is None else world_size
        sources, problems = prepare(values)
        problems += drop_unknown_keys(values)
        problems += _solve_batch(values, sources, ranks)
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise_problems(problems + validation_problems(error), name)
            raise
        problems += self.zero_optimization.sharding_problems(ranks)
        raise_problems(problems + _contradictions(self) + unbuilt_problems(self), name)
        self._raw.update(raw)
        self._sources.update(sources)

    # For pydantic's own ways to make a model (model_validate and the like), which take validated keys, not a source.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]


def load_config(source: str | os.PathLike[str] | Mapping[str, Any], *, world_size: int = 1) -> DeepSpeedConfig:
    """The configuration ``source`` for ``world_size`` data-parallel ranks: see :class:`DeepSpeedConfig`."""
    return DeepSpeedConfig(source, world_size=world_size)


def _data_parallel_size(mpu: Any, mesh_device: Any) -> int:
    if mesh_device is not None:
        names = mesh_device.mesh_dim_names or ()
        if "data_parallel" not in names:
            raise ConfigError(f"mesh_device has the dimensions {tuple(names)}; give a mesh with one named 'data_parallel'")
        return int(mesh_device.size(names.index("data_parallel")))
    if mpu is not None:
        return int(mpu.get_data_parallel_world_size())
    # Imported here: a configuration is read without torch as well, and then there is no process group.
    import torch.distributed as dist

    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _solve_batch(values: dict[str, Any], sources: dict[str, Origin], world_size: int) -> list[Problem]:
    """Put the three batch sizes into ``values``, or take them out where they are wrong."""
    given = {key: values.pop(key) for key in BATCH_KEYS if key in values}
    batch = solve_batch_sizes(given, world_size=world_size)
    if not isinstance(batch, BatchSizes):
        return batch
    for key, number in zip(BATCH_KEYS, (batch.train, batch.micro, batch.accumulation), strict=True):
        values[key] = number
        solution = explain_solution(key, batch, given, world_size)
        if solution is not None:
            auto = "auto: " if key in sources else ""
            sources[key] = Origin(Kind.SOLVED, f"{auto}{solution}")
    return []


def _contradictions(config: RootSection) -> list[Problem]:
    problems = []
    zero = config.zero_optimization
    if config.fp16.enabled and config.bf16.enabled:
        problems.append(Problem("fp16.enabled, bf16.enabled", "both are true; a model has one of them. Set one to false."))
    if config.data_types.split_master and not config.bf16.enabled:
        problems.append(Problem("data_types.split_master", "needs bf16.enabled: it is the other half of bf16 parameters."))
    if zero.offloads_optimizer and zero.stage < 1:
        problems.append(Problem("zero_optimization.offload_optimizer", "needs stage 1, 2 or 3; found stage 0."))
    if zero.offloads_parameters and zero.stage < 3:
        problems.append(Problem("zero_optimization.offload_param", f"needs stage 3; found stage {zero.stage}."))
    for name, section in (("offload_optimizer", zero.offload_optimizer), ("offload_param", zero.offload_param)):
        if section.device == "nvme" and not section.nvme_path:
            problems.append(Problem(f"zero_optimization.{name}.nvme_path", "is missing; device nvme needs a directory."))
    return problems + config.checkpoint.contradictions() + config.activation_checkpointing.contradictions()
