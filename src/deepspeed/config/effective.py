"""The values that are in effect, one by one, and where each came from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .origin import DEFAULT, Kind, Origin
from .root import RootSection
from .section import Section, stage_of, unit_of
from .tuning import DEEPCOMPILE

IDLE = (
    "amp",
    "compression_training",
    "pipeline",
    "sparse_attention",
    "tensor_parallel",
    "zero_optimization.leaf_module",
    *(f"compile.{name}" for name in DEEPCOMPILE),
)
"""Sections and keys that no feature reads yet."""


@dataclass(frozen=True)
class Entry:
    """A key (dotted), its value with its unit, where that came from, and why nothing reads it (empty: something does)."""

    path: str
    value: Any
    unit: str
    origin: Origin
    idle: str = ""


def effective_entries(config: RootSection) -> Iterator[Entry]:
    """Every key of ``config`` in the order of the schema, but the keys of a section before the sections in it; entries of a
    free-form key (``optimizer.params``) one by one."""
    yield from _entries(config, config, "", "")


def _entries(config: RootSection, section: Section, path: str, outside: str) -> Iterator[Entry]:
    """The entries of ``section``; ``outside`` is why nothing reads the section around it."""
    inside = outside
    if not getattr(section, "enabled", True):
        inside = inside or "its section is off"
    elif getattr(section, "device", "") == "none":
        inside = inside or "its device is none"
    elif path == "aio." and "nvme" not in _devices(config):
        inside = inside or "only device nvme reads it"
    elif path[:-1] in IDLE:
        inside = inside or "nothing reads it yet"
    sections = []
    for name, field in type(section).model_fields.items():
        value, inner, stage = getattr(section, name), f"{path}{name}", stage_of(field)
        idle = outside if name in ("enabled", "device") else inside
        if stage and stage != config.zero_optimization.stage:
            idle = idle or f"only stage {stage} reads it"
        if inner in IDLE:
            idle = idle or "nothing reads it yet"
        if isinstance(value, Section):
            sections.append((value, inner))
        elif isinstance(value, dict) and value:
            for key, item in value.items():
                yield Entry(f"{inner}.{key}", item, "", _origin(config, f"{inner}.{key}"), idle)
        else:
            yield Entry(inner, value, unit_of(field), _origin(config, inner), idle)
    for value, inner in sections:
        yield from _entries(config, value, f"{inner}.", inside)


def _origin(config: RootSection, path: str) -> Origin:
    """The origin of ``path``, or of what was given inside it."""
    found = config.origin(path)
    inside = [origin for other, origin in config.sources.items() if other.startswith(f"{path}.")]
    return inside[0] if found == DEFAULT and inside and inside[0].kind is not Kind.AUTO else found


def _devices(config: RootSection) -> set[str]:
    zero = config.zero_optimization
    return {zero.offload_optimizer.device, zero.offload_param.device}
