"""The configuration as JSON Schema (draft 2020-12), for editors.

pydantic describes what a value becomes; this adds what may be written for it: "auto" and null for every key, numbers as
strings, words in any case, other names of keys, keys with dots.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

from pydantic.fields import FieldInfo

from .renames import RENAMES, Rename
from .root import RootSection
from .section import DTYPE_NAMES, DtypeNames, Lowered, Section, section_class, stage_of, unit_of

DRAFT = "https://json-schema.org/draft/2020-12/schema"
NUMERIC = r"^\s*[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?\s*$"
LEFT_OUT: list[dict[str, Any]] = [{"const": "auto"}, {"type": "null"}]


def json_schema() -> dict[str, Any]:
    """A schema that accepts what :func:`load_config` accepts, but for other top-level keys, of which that warns."""
    schema = RootSection.model_json_schema()
    definitions = schema["$defs"]
    for section in _sections(RootSection):
        properties = (schema if section is RootSection else definitions[section.__name__])["properties"]
        for name, field in section.model_fields.items():
            properties[name] = _widened(properties[name], field)
    for rename in RENAMES:
        owner: type[Section] | None = RootSection
        *parents, leaf = rename.old.split(".")
        for name in parents:
            owner = section_class(owner.model_fields[name]) if owner is not None else None
        assert owner is not None, f"{rename.old} is in a section"
        home = schema if owner is RootSection else definitions[owner.__name__]
        home["properties"][leaf] = _other_name(rename)
    definitions["ZeroConfig"]["properties"]["offload_optimizer"]["anyOf"].append({"const": False})
    definitions["ZeroConfig"]["properties"]["offload_param"]["anyOf"].append({"const": False})
    schema["properties"]["zero_optimization"]["anyOf"].append({"type": "boolean", "deprecated": True})
    schema["properties"]["$schema"] = {"type": "string", "description": "The place of this schema, for editors."}
    schema["patternProperties"] = {r"^[a-z_]+\.": {"description": "A key of the section that it names."}}
    for definition in definitions.values():
        definition["description"] = " ".join(definition["description"].split())
    schema.pop("description")
    return {"$schema": DRAFT, **schema, "title": "ds_config.json"}


def _sections(section: type[Section]) -> Iterator[type[Section]]:
    yield section
    for field in section.model_fields.values():
        inner = section_class(field)
        if inner is not None:
            yield from _sections(inner)


def _widened(schema: dict[str, Any], field: FieldInfo) -> dict[str, Any]:
    """``schema`` of one key, accepting all that may be written for it."""
    options = [dict(option) for option in schema.pop("anyOf", [])]
    if not options:
        # What describes the key stays with the key; the rest is its one option.
        described = ("title", "description", "default", "unit", "stage")
        options = [{name: schema.pop(name) for name in list(schema) if name not in described}]
    if any(option.get("type") in ("integer", "number") for option in options):
        options.append({"type": "string", "pattern": NUMERIC})
    for option in options:
        if "enum" in option and _marked(field, Lowered):
            option["enum"] = [form for word in option["enum"] for form in (word, word.capitalize(), word.upper())]
        if "enum" in option and _marked(field, DtypeNames):
            option["enum"] += [name for name, known in DTYPE_NAMES.items() if known in option["enum"]]
    if section_class(field) is not None:
        schema.pop("default", None)
    unit, stage = unit_of(field), stage_of(field)
    schema["description"] = (
        (f"Stage {stage}: " if stage else "") + schema.get("description", "") + (f" Unit: {unit}." if unit else "")
    )
    return {**schema, "anyOf": options + [option for option in LEFT_OUT if option not in options]}


def _marked(field: FieldInfo, marker: Any) -> bool:
    """Whether the key's type, or a member of its union, is annotated with ``marker``."""
    found = [*field.metadata, *(item for part in get_args(field.annotation) for item in getattr(part, "__metadata__", ()))]
    return any(item is marker for item in found)


def _other_name(rename: Rename) -> dict[str, Any]:
    names = " and ".join(rename.new)
    return {"description": f"Another name of {names}.", **({"deprecated": True} if rename.deprecated else {})}
