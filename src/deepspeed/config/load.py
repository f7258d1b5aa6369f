"""From what the user wrote to a validated configuration."""

from __future__ import annotations

import copy
import difflib
import logging
import os
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from .batch import BATCH_KEYS, BatchSizes, solve_batch_sizes
from .errors import Problem, raise_problems, shown
from .root import DeepSpeedConfig
from .section import OpenSection, Section, section_class
from .source import read_source
from .unbuilt import unbuilt_problems

logger = logging.getLogger("DeepSpeed")

CLOSE = 0.84
"""Similarity above which an unknown top-level key is taken for a misspelt one."""


def load_config(
    source: str | os.PathLike[str] | Mapping[str, Any],
    *,
    world_size: int = 1,
    auto: Mapping[str, object] | None = None,
) -> DeepSpeedConfig:
    """Read and validate a configuration for ``world_size`` data-parallel ranks.

    ``source`` is a path, a mapping, a JSON string or base64 of one. ``auto`` gives values (by dotted key) for entries
    that are ``"auto"``; other such entries take the key's default. Raises ConfigError with all problems found.
    """
    raw, origin = read_source(source)
    values = copy.deepcopy(raw)
    sources: dict[str, str] = {}
    problems: list[Problem] = []
    _spread_dotted_keys(values)
    _move_misplaced_aio(values)
    _resolve_auto(values, auto or {}, sources)
    problems += _unknown_keys(values)
    for path in _paths(values):
        sources.setdefault(path, "given")
    batch = solve_batch_sizes({key: values.get(key) for key in BATCH_KEYS}, world_size=world_size)
    if isinstance(batch, BatchSizes):
        solved = zip(BATCH_KEYS, (batch.train, batch.micro, batch.accumulation), strict=True)
        for key, number in solved:
            if values.get(key) is None:
                sources[key] = "solved"
            values[key] = number
    else:
        problems += batch
        for key in BATCH_KEYS:
            values.pop(key, None)
    try:
        config = DeepSpeedConfig(**{key: value for key, value in values.items() if key in DeepSpeedConfig.model_fields})
    except ValidationError as error:
        raise_problems(problems + [_said_plainly(item) for item in error.errors()], origin)
        raise
    raise_problems(problems + _contradictions(config) + unbuilt_problems(config), origin)
    config._raw.update(raw)
    config._sources.update(sources)
    return config


def _spread_dotted_keys(values: dict[str, Any]) -> None:
    """Apply top-level keys such as "zero_optimization.reduce_bucket_size" to the section that they name."""
    for key in [key for key in values if "." in key]:
        section, _, rest = key.partition(".")
        if section in DeepSpeedConfig.model_fields:
            values.setdefault(section, {})[rest] = values.pop(key)


def _move_misplaced_aio(values: dict[str, Any]) -> None:
    zero = values.get("zero_optimization")
    if isinstance(zero, dict) and "aio" in zero:
        values.setdefault("aio", zero.pop("aio"))


def _resolve_auto(values: dict[str, Any], auto: Mapping[str, object], sources: dict[str, str], path: str = "") -> None:
    for key in list(values):
        inner = f"{path}.{key}" if path else key
        if isinstance(values[key], dict):
            _resolve_auto(values[key], auto, sources, inner)
        elif values[key] == "auto":
            del values[key]
            if inner in auto:
                values[key] = auto[inner]
                sources[inner] = "auto: given by the caller"
            else:
                sources[inner] = "default"


def _paths(values: Mapping[str, Any], path: str = "") -> Iterator[str]:
    for key, value in values.items():
        inner = f"{path}.{key}" if path else key
        if isinstance(value, Mapping):
            yield from _paths(value, inner)
        else:
            yield inner


def _unknown_keys(values: dict[str, Any]) -> list[Problem]:
    """Problems for misspelt top-level keys and unknown ones in sections; other top-level ones are warned of."""
    problems = []
    for key in [key for key in values if key not in DeepSpeedConfig.model_fields]:
        close = difflib.get_close_matches(key, DeepSpeedConfig.model_fields, n=1, cutoff=CLOSE)
        if close:
            problems.append(Problem(key, f"is not a key of the configuration. Did you mean '{close[0]}'?"))
        else:
            logger.warning("the configuration key '%s' is not known and has no effect", key)
        del values[key]
    problems += _unknown_in(DeepSpeedConfig, values, "")
    return problems


def _unknown_in(section: type[Section], values: dict[str, Any], path: str) -> list[Problem]:
    problems = []
    for key in list(values):
        inner = f"{path}.{key}" if path else key
        if key not in section.model_fields:
            if not issubclass(section, OpenSection):
                close = difflib.get_close_matches(key, section.model_fields, n=3, cutoff=0.5)
                names = ", ".join(f"'{name}'" for name in close) or ", ".join(section.model_fields)
                problems.append(Problem(inner, f"is not a key of '{path}'. The nearest ones: {names}."))
                del values[key]
            continue
        child = section_class(section.model_fields[key])
        if child is not None and isinstance(values[key], dict):
            problems += _unknown_in(child, values[key], inner)
    return problems


def _said_plainly(error: Any) -> Problem:
    path = ".".join(str(part) for part in error["loc"])
    message = error["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
    return Problem(path, f"found {shown(error['input'])}, {message}.")


def _contradictions(config: DeepSpeedConfig) -> list[Problem]:
    problems = []
    if config.fp16.enabled and config.bf16.enabled:
        problems.append(Problem("fp16.enabled, bf16.enabled", "both are true; a model has one of them. Set one to false."))
    if config.zero_optimization.offloads_optimizer and config.zero_optimization.stage < 1:
        problems.append(Problem("zero_optimization.offload_optimizer", "needs stage 1, 2 or 3; found stage 0."))
    if config.zero_optimization.offloads_parameters and config.zero_optimization.stage < 3:
        problems.append(Problem("zero_optimization.offload_param", "needs stage 3."))
    return problems
