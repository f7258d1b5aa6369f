"""What all sections of the configuration share: how a key is declared, and the numbers that people write."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue
from pydantic.fields import FieldInfo


def integral(value: Any) -> Any:
    """Integers as people write them: 500000000, 5e8, "5e8". A truth value is no number."""
    if isinstance(value, bool):
        raise ValueError("expected a whole number")
    if isinstance(value, str):
        try:
            return int(value)
        except ValueError:
            pass
        try:
            value = float(value)
        except ValueError:
            raise ValueError("expected a whole number") from None
    if isinstance(value, float):
        if not (math.isfinite(value) and value.is_integer()):
            raise ValueError("expected a whole number")
        return int(value)
    return value


def _real(value: Any) -> Any:
    """Numbers as people write them: 0.1, 1, "1e-3". A truth value is no number."""
    if isinstance(value, bool):
        raise ValueError("expected a number")
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            raise ValueError("expected a number") from None
    return value


DTYPE_NAMES = {
    "float32": "fp32",
    "float": "fp32",
    "float16": "fp16",
    "half": "fp16",
    "bfloat16": "bf16",
    "bfp16": "bf16",
}
"""Other names of dtypes. A "torch." before a name is understood too."""


def _dtype(value: Any) -> Any:
    """The name of a dtype as this package writes it: fp32, fp16 or bf16."""
    name = str(value).removeprefix("torch.").lower()
    return DTYPE_NAMES.get(name, name)


def _rounded_down(value: Any) -> Any:
    """A number of elements that tools compute, such as 0.9 times another; the fraction is dropped."""
    return math.floor(value) if isinstance(value, float) and math.isfinite(value) else integral(value)


Int = Annotated[int, BeforeValidator(integral)]
"""An integer, which may be written as an integral float or a numeric string."""

Most = Annotated[int, BeforeValidator(_rounded_down)]
"""An integer that bounds something, of which a fraction is dropped."""

AnyReal = Annotated[float, BeforeValidator(_real)]
"""A number, possibly infinite, which may be written as a numeric string."""

Real = Annotated[float, BeforeValidator(_real), Field(allow_inf_nan=False)]
"""A finite number, which may be written as a numeric string."""

Lowered = BeforeValidator(lambda value: value.lower() if isinstance(value, str) else value)
"""Accepts a word in any case."""

DtypeNames = BeforeValidator(_dtype)
"""Accepts the several names of a dtype."""


def key(default: Any, description: str, *, unit: str = "", stage: int = 0, **constraints: Any) -> Any:
    """A key of a section: its default, its meaning, the unit of its number, the one ZeRO stage that reads it (0: all), and
    pydantic's constraints."""
    extra: dict[str, JsonValue] = {}
    if unit:
        extra["unit"] = unit
    if stage:
        extra["stage"] = stage
    return Field(default, description=description, json_schema_extra=extra or None, **constraints)


class Section(BaseModel):
    """A block of the configuration: its keys with their types, defaults and meanings. Immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class OpenSection(Section):
    """A block whose other keys belong to somebody else and are passed on unchecked."""

    model_config = ConfigDict(extra="allow", frozen=True, protected_namespaces=())


def section_class(field: FieldInfo) -> type[Section] | None:
    """The class of the section that ``field`` holds, None where it holds a plain value."""
    if get_origin(field.annotation) in (list, dict):
        return None
    for candidate in (field.annotation, *get_args(field.annotation)):
        if isinstance(candidate, type) and issubclass(candidate, Section):
            return candidate
    return None


def unit_of(field: FieldInfo) -> str:
    """The unit of a key's number, empty where it has none."""
    return str(_extra(field).get("unit", ""))


def stage_of(field: FieldInfo) -> int:
    """The one ZeRO stage that reads a key, 0 where all do."""
    return int(_extra(field).get("stage", 0))


def _extra(field: FieldInfo) -> dict[str, Any]:
    return field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}


def fields(section: type[Section], path: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every key of ``section`` and of its inner sections that is no section itself, by dotted path."""
    for name, field in section.model_fields.items():
        inner = section_class(field)
        if inner is None:
            yield f"{path}{name}", field
        else:
            yield from fields(inner, f"{path}{name}.")
