"""Other names of keys: deprecated ones, which are mapped with a warning, and equally good ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .errors import Problem, shown, warn
from .origin import Kind, Origin

ZERO = "zero_optimization"


@dataclass(frozen=True)
class Rename:
    """``old`` means the keys ``new`` with the value that ``convert`` makes of it (None: it says nothing)."""

    old: str
    new: tuple[str, ...]
    convert: Callable[[Any], Any] = lambda value: value
    deprecated: bool = True


def _switch(on: Any, off: Any) -> Callable[[Any], Any]:
    """A conversion of a truth value; anything else stays, for validation to complain of."""
    return lambda value: {True: on, False: off}[value] if isinstance(value, bool) else value


def _stage_3(name: str) -> Rename:
    return Rename(f"{ZERO}.{name}", (f"{ZERO}.stage3_{name}",), deprecated=False)


RENAMES = (
    Rename("bfloat16", ("bf16",)),
    Rename("allgather_size", (f"{ZERO}.allgather_bucket_size",)),
    Rename("zero_allgather_bucket_size", (f"{ZERO}.allgather_bucket_size",)),
    Rename("fp32_allreduce", ("communication_data_type",), _switch("fp32", None)),
    Rename(f"{ZERO}.cpu_offload", (f"{ZERO}.offload_optimizer.device",), _switch("cpu", "none")),
    Rename(f"{ZERO}.cpu_offload_params", (f"{ZERO}.offload_param.device",), _switch("cpu", "none")),
    Rename(f"{ZERO}.cpu_offload_use_pin_memory", (f"{ZERO}.offload_optimizer.pin_memory", f"{ZERO}.offload_param.pin_memory")),
    Rename(f"{ZERO}.stage3_gather_fp16_weights_on_model_save", (f"{ZERO}.stage3_gather_16bit_weights_on_model_save",)),
    Rename(f"{ZERO}.gather_fp16_weights_on_model_save", (f"{ZERO}.stage3_gather_16bit_weights_on_model_save",)),
    _stage_3("gather_16bit_weights_on_model_save"),
    _stage_3("max_live_parameters"),
    _stage_3("max_reuse_distance"),
    _stage_3("prefetch_bucket_size"),
    _stage_3("param_persistence_threshold"),
    _stage_3("model_persistence_threshold"),
    _stage_3("module_granularity_threshold"),
    _stage_3("use_all_reduce_for_fetch_params"),
    # Where people put it who follow an example in another project's documentation.
    Rename(f"{ZERO}.aio", ("aio",), deprecated=False),
    Rename("aio.intra_op_parallelism", ("aio.thread_count",), deprecated=False),
)


def apply_renames(values: dict[str, Any], sources: dict[str, Origin]) -> list[Problem]:
    """Move every value under another name to the key that it means, and note that in ``sources``.

    Returns a problem for each name whose key is given too, with a different value.
    """
    problems: list[Problem] = []
    for rename in RENAMES:
        *parents, leaf = rename.old.split(".")
        section: Any = values
        for name in parents:
            section = section.get(name) if isinstance(section, dict) else None
        if not isinstance(section, dict) or leaf not in section:
            continue
        if rename.deprecated:
            new = "' and '".join(rename.new)
            warn(f"the configuration key '{rename.old}' is deprecated; use '{new}'")
        value = rename.convert(section.pop(leaf))
        origin = Origin(Kind.RENAMED, f"given as {rename.old}" + (" (deprecated)" if rename.deprecated else ""))
        for path in rename.new if value is not None else ():
            problems += _merge(values, path, value, origin, sources)
    return problems


def _merge(values: dict[str, Any], path: str, value: Any, origin: Origin, sources: dict[str, Origin]) -> list[Problem]:
    """Set the key ``path`` to ``value`` unless it has that value already; another value is a problem."""
    if isinstance(value, dict):
        # An empty section still has to appear: its presence may mean something.
        if path not in values and "." not in path:
            values[path] = {}
        return [item for key, inner in value.items() for item in _merge(values, f"{path}.{key}", inner, origin, sources)]
    *parents, leaf = path.split(".")
    section: Any = values
    for name in parents:
        section = section.setdefault(name, {}) if isinstance(section, dict) else None
    if not isinstance(section, dict):
        return []
    present = section.get(leaf, "auto")
    if present == "auto":
        section[leaf] = value
        sources[path] = origin
    elif value != "auto" and not _same(present, value):
        sentence = f"found {shown(present)}, but also {shown(value)} {origin}. Keep one of them."
        return [Problem(path, sentence)]
    return []


def _same(one: Any, other: Any) -> bool:
    """Equality that takes "5e8" and 500000000 for the same number, but not true and 1."""
    if one == other or isinstance(one, bool) or isinstance(other, bool):
        return bool(one == other)
    try:
        return float(one) == float(other)
    except (TypeError, ValueError, OverflowError):
        return False
