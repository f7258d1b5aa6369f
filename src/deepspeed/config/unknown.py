"""Keys that the schema does not have: misspelt ones are errors, other top-level ones a warning."""

from __future__ import annotations

import difflib
from typing import Any

from .errors import Problem, warn
from .root import RootSection
from .section import OpenSection, Section, fields, section_class

CLOSE = 0.84
"""Similarity above which an unknown top-level key is taken for a misspelt one."""

SILENT = ("$schema",)
"""Top-level keys that are for editors."""


def drop_unknown_keys(values: dict[str, Any]) -> list[Problem]:
    """Take unknown keys out of ``values``. Returns a problem for each misspelt top-level key and each unknown key in a
    section; other unknown top-level keys are warned of, because integrations and tools add keys of their own."""
    problems = []
    for key in [key for key in values if key not in RootSection.model_fields]:
        close = difflib.get_close_matches(key, RootSection.model_fields, n=1, cutoff=CLOSE)
        if close:
            problems.append(Problem(key, f"unknown key; did you mean '{close[0]}'?"))
        elif key not in SILENT:
            warn(f"the configuration key '{key}' is not known and has no effect{_homes(key)}")
        del values[key]
    return problems + _drop_in(RootSection, values, "")


def _drop_in(section: type[Section], values: dict[str, Any], path: str) -> list[Problem]:
    problems = []
    for key in list(values):
        if key not in section.model_fields:
            if not issubclass(section, OpenSection):
                problems.append(Problem(f"{path}{key}", f"unknown key{suggestion(key, section, path)}"))
                del values[key]
            continue
        child = section_class(section.model_fields[key])
        if child is not None and isinstance(values[key], dict):
            problems += _drop_in(child, values[key], f"{path}{key}.")
    return problems


def suggestion(key: str, section: type[Section], path: str) -> str:
    """What the unknown ``key`` of ``section`` (with dotted ``path``, ending in a dot) could have been."""
    close = difflib.get_close_matches(key, section.model_fields, n=1, cutoff=0.7)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; the keys of '{path[:-1]}' are {', '.join(section.model_fields)}.{_homes(key)}"


def _homes(key: str) -> str:
    """Where a key of this name is known."""
    homes = [path for path, _ in fields(RootSection) if path.split(".")[-1] == key and key != "enabled"]
    return f" (there is '{homes[0]}')" if len(homes) == 1 else ""
