"""pydantic's complaints in the words of this package."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from .errors import Problem, shown
from .root import RootSection
from .section import Section, section_class

EXPECTED = {
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "a string",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "list_type": "a list",
    "dict_type": "an object {{...}}",
    "literal_error": "{expected}",
    "greater_than": "a number above {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "less_than": "a number below {lt:g}",
    "less_than_equal": "at most {le:g}",
}
"""What each kind of complaint expected, with pydantic's own context filled in."""


def validation_problems(error: ValidationError) -> list[Problem]:
    """One problem for each key that ``error`` complains of."""
    problems: dict[str, Problem] = {}
    for item in error.errors():
        # A union of types adds the names of its members to the path, and a complaint for each.
        path = ".".join(str(part) for part in item["loc"] if re.fullmatch(r"\w+", str(part)) and part not in ("int", "str"))
        problems.setdefault(path, Problem(path, _sentence(item, item["loc"])))
    return list(problems.values())


def _sentence(item: Mapping[str, Any], location: Sequence[int | str]) -> str:
    kind = item["type"]
    if kind == "missing":
        return "is missing."
    if kind == "extra_forbidden":
        return "unknown key."
    found = f"found {shown(item['input'])}"
    if kind == "model_type":
        section = _section_at(location)
        example = ' such as {"enabled": true}' if section is not None and "enabled" in section.model_fields else ""
        return f"{found}, expected an object{example}."
    if kind in EXPECTED:
        return f"{found}, expected {EXPECTED[kind].format_map(item.get('ctx', {}))}."
    return f"{found}, {item['msg'].removeprefix('Value error, ')}."


def _section_at(location: Sequence[int | str]) -> type[Section] | None:
    section: type[Section] | None = RootSection
    for part in location:
        field = section.model_fields.get(str(part)) if section is not None else None
        section = section_class(field) if field is not None else None
    return section
