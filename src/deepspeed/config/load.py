"""From what the user wrote to a validated configuration."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from .batch import BATCH_KEYS, BatchSizes, explain_solution, solve_batch_sizes
from .errors import Problem, raise_problems
from .origin import Kind, Origin
from .plain import validation_problems
from .prepare import prepare
from .root import DeepSpeedConfig
from .source import read_source
from .unbuilt import unbuilt_problems
from .unknown import drop_unknown_keys


def load_config(source: str | os.PathLike[str] | Mapping[str, Any], *, world_size: int = 1) -> DeepSpeedConfig:
    """Read and validate a configuration for ``world_size`` data-parallel ranks.

    ``source`` is a path, a mapping, a JSON string or base64 of one. Entries that are "auto" take the key's default, and
    batch sizes are solved. Raises ConfigError with all problems found.
    """
    raw, name = read_source(source)
    values = copy.deepcopy(raw)
    sources, problems = prepare(values)
    problems += drop_unknown_keys(values)
    problems += _solve_batch(values, sources, world_size)
    try:
        config = DeepSpeedConfig(**values)
    except ValidationError as error:
        raise_problems(problems + validation_problems(error), name)
        raise
    raise_problems(problems + _contradictions(config) + unbuilt_problems(config), name)
    config._raw.update(raw)
    config._sources.update(sources)
    return config


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


def _contradictions(config: DeepSpeedConfig) -> list[Problem]:
    problems = []
    zero = config.zero_optimization
    if config.fp16.enabled and config.bf16.enabled:
        problems.append(Problem("fp16.enabled, bf16.enabled", "both are true; a model has one of them. Set one to false."))
    if zero.offloads_optimizer and zero.stage < 1:
        problems.append(Problem("zero_optimization.offload_optimizer", "needs stage 1, 2 or 3; found stage 0."))
    if zero.offloads_parameters and zero.stage < 3:
        problems.append(Problem("zero_optimization.offload_param", f"needs stage 3; found stage {zero.stage}."))
    for name, section in (("offload_optimizer", zero.offload_optimizer), ("offload_param", zero.offload_param)):
        if section.device == "nvme" and not section.nvme_path:
            problems.append(Problem(f"zero_optimization.{name}.nvme_path", "is missing; device nvme needs a directory."))
    return problems + config.activation_checkpointing.contradictions()
