"""What all sections of the configuration share."""

from __future__ import annotations

import math
from typing import Annotated, Any, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic.fields import FieldInfo


def _integral(value: Any) -> Any:
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
            return value
    if isinstance(value, float) and math.isfinite(value) and value.is_integer():
        return int(value)
    return value


def _real(value: Any) -> Any:
    """Numbers as people write them: 0.1, 1, "1e-3". A truth value is no number."""
    if isinstance(value, bool):
        raise ValueError("expected a number")
    return value


Int = Annotated[int, BeforeValidator(_integral)]
"""An integer, which may be written as an integral float or a numeric string."""

AnyReal = Annotated[float, BeforeValidator(_real)]
"""A number, possibly infinite, which may be written as a numeric string."""

Real = Annotated[float, BeforeValidator(_real), Field(allow_inf_nan=False)]
"""A finite number, which may be written as a numeric string."""


class Section(BaseModel):
    """A block of the configuration: its keys with their types, defaults and meanings. Immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class OpenSection(Section):
    """A block of a feature whose inner keys are not checked one by one while the feature is off."""

    model_config = ConfigDict(extra="allow", frozen=True, protected_namespaces=())

    enabled: bool = False


def section_class(field: FieldInfo) -> type[Section] | None:
    """The class of the section that ``field`` holds, None where it holds a plain value."""
    for candidate in (field.annotation, *get_args(field.annotation)):
        if isinstance(candidate, type) and issubclass(candidate, Section):
            return candidate
    return None
