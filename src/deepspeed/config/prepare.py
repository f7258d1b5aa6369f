"""From what the user wrote to one plain dictionary of canonical keys: the steps before validation.

In this order: sections written as a truth value, keys written with dots, nulls (a key left out), other names of keys,
"auto" values. Each notes in ``sources`` where the values that it sets came from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from .errors import Problem, warn
from .origin import GIVEN, Kind, Origin
from .renames import apply_renames
from .root import RootSection
from .section import Section, section_class

AUTO_FROM = {"scheduler.params.warmup_max_lr": "optimizer.params.lr"}
"""Keys whose "auto" is the value of another key. Every other "auto" that nobody filled in is the key's default."""


def prepare(values: dict[str, Any]) -> tuple[dict[str, Origin], list[Problem]]:
    """Bring ``values`` to canonical form, in place. Returns the origins of its values and what is wrong with it."""
    sources: dict[str, Origin] = {}
    _open_switches(values, sources)
    _spread_dotted_keys(values, sources)
    _drop_nulls(RootSection, values)
    problems = apply_renames(values, sources)
    _resolve_auto(values, values, sources, "")
    for path in _paths(values):
        sources.setdefault(path, GIVEN)
    return sources, problems


def _open_switches(values: dict[str, Any], sources: dict[str, Origin]) -> None:
    """``zero_optimization`` and its offload sections may be true or false."""
    zero = values.get("zero_optimization")
    if isinstance(zero, bool):
        warn("the configuration key 'zero_optimization' as true or false is deprecated; give a 'stage'")
        values["zero_optimization"] = {"stage": int(zero)}
        sources["zero_optimization.stage"] = Origin(
            Kind.RENAMED, f"given as zero_optimization: {str(zero).lower()} (deprecated)"
        )
    elif isinstance(zero, dict):
        for name in ("offload_optimizer", "offload_param"):
            if zero.get(name) is False:
                zero[name] = {"device": "none"}


def _spread_dotted_keys(values: dict[str, Any], sources: dict[str, Origin]) -> None:
    """Apply top-level keys such as "zero_optimization.reduce_bucket_size" to the section that they name. They win over
    the section's own value: tools write them to adapt a finished configuration."""
    for key in [key for key in values if "." in key]:
        *parents, leaf = key.split(".")
        if parents[0] not in RootSection.model_fields:
            continue
        section = values
        for name in parents:
            if not isinstance(section.get(name), dict):
                section[name] = {}
            section = section[name]
        section[leaf] = values.pop(key)
        sources[key] = Origin(Kind.RENAMED, f"given as the top-level key '{key}'")


def _drop_nulls(section: type[Section], values: dict[str, Any]) -> None:
    for name, field in section.model_fields.items():
        if name in values and values[name] is None:
            del values[name]
        child = section_class(field)
        if child is not None and isinstance(values.get(name), dict):
            _drop_nulls(child, values[name])


def _resolve_auto(values: dict[str, Any], whole: dict[str, Any], sources: dict[str, Origin], path: str) -> None:
    for key in list(values):
        inner = f"{path}{key}"
        if isinstance(values[key], dict):
            _resolve_auto(values[key], whole, sources, f"{inner}.")
        elif values[key] == "auto":
            del values[key]
            sources[inner] = Origin(Kind.AUTO, "auto: default")
            found = _value_at(whole, AUTO_FROM[inner]) if inner in AUTO_FROM else None
            if found is not None and found != "auto":
                values[key] = found
                sources[inner] = Origin(Kind.AUTO, f"auto: from {AUTO_FROM[inner]}")


def _value_at(values: Any, path: str) -> Any:
    for name in path.split("."):
        values = values.get(name) if isinstance(values, dict) else None
    return values


def _paths(values: Mapping[str, Any], path: str = "") -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _paths(value, f"{path}{key}.")
        else:
            yield f"{path}{key}"
