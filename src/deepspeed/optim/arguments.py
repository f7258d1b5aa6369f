"""Keyword arguments from a configuration, checked against the signature of what they are for."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any

ELSEWHERE = {
    "max_grad_norm": "clipping is the top-level key 'gradient_clipping'",
    "clip_grad": "clipping is the top-level key 'gradient_clipping'",
}
"""Arguments that other implementations take here, and where they belong."""


def checked_arguments(
    section: str, kind: str, function: Callable[..., Any], params: Mapping[str, object], *, given: Collection[str]
) -> dict[str, Any]:
    """``params`` as keyword arguments of ``function``, with numeric strings as numbers and lists of betas as tuples.

    ``given`` are the arguments that the caller supplies. Raises ValueError, by ``section`` and ``kind``, for an unknown
    or missing argument and for one that is still "auto".
    """
    signature = inspect.signature(function).parameters
    allowed = {name: item for name, item in signature.items() if name not in given}
    for name, value in params.items():
        if name not in allowed:
            raise ValueError(_unknown(section, kind, name, list(allowed)))
        if value == "auto":
            raise ValueError(f"{section}.params.{name} is still 'auto'; give {kind} a value")
    missing = [name for name, item in allowed.items() if item.default is item.empty and name not in params]
    if missing:
        raise ValueError(f"{section}.params lacks {', '.join(missing)}, which {kind} needs")
    return {name: _converted(name, value) for name, value in params.items()}


def closest(name: str, known: Collection[str]) -> str:
    """A question that suggests the known name most like ``name``, empty where none is."""
    matches = difflib.get_close_matches(name.lower(), [item.lower() for item in known], n=1)
    return next((f" Did you mean '{item}'?" for item in known if [item.lower()] == matches), "")


def _unknown(section: str, kind: str, name: str, allowed: Collection[str]) -> str:
    if name in ELSEWHERE:
        return f"{section}.params.{name} is not an argument of {kind}: {ELSEWHERE[name]}"
    return f"{section}.params.{name} is not an argument of {kind}.{closest(name, allowed)} Allowed: {', '.join(allowed)}"


def _converted(name: str, value: object) -> object:
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return tuple(value) if name == "betas" and isinstance(value, list) else value
