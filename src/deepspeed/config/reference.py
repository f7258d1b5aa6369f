"""The reference page of keys, made from the schema."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from .effective import IDLE
from .renames import RENAMES
from .root import RootSection
from .section import Section, section_class, stage_of, unit_of
from .unbuilt import ONLY, OPTIMIZERS, SWITCHES, UNBUILT

INTRODUCTION = """\
# Configuration

This page is made from the schema by `deepspeed config reference > docs/config.md`.

`deepspeed.initialize(config=...)` takes a path, a dictionary, a JSON string or base64 of one, such as `ds_config.json`:

```json file=ds_config.json
{
  "train_batch_size": 64,
  "optimizer": {"type": "AdamW", "params": {"lr": 3e-4}},
  "bf16": {"enabled": true},
  "zero_optimization": {"stage": 2}
}
```

Look at one before you train:

```sh
deepspeed config explain ds_config.json --world_size 8   # every effective value, and where it came from
deepspeed config schema > ds_config.schema.json          # JSON Schema for editors: "$schema": "./ds_config.schema.json"
```

What holds for all keys:

- Numbers may be written as 500000000, 5e8, "5e8"; true and false are no numbers. A key written twice is an error.
- `null` is a key left out. `"auto"` is filled in by an integration (Transformers, Accelerate); where none did, batch sizes are
  solved, `scheduler.params.warmup_max_lr` is the optimizer's `lr`, and every other key has its default.
- An unknown key in a section is an error that suggests the nearest one, and so is a misspelt key at the top level. Any other
  top-level key is a warning: it has no effect.
- A top-level key with dots, `"zero_optimization.reduce_bucket_size"`, sets the key that it names.
- A key of one ZeRO stage (marked `Stage 3:`) has no effect at the others.
- A key that asks for what is not built is an error that says so (listed [below](#what-is-not-built-yet)).

Batch sizes: `train_batch_size` = `train_micro_batch_size_per_gpu` x `gradient_accumulation_steps` x data-parallel ranks. Any
one of them follows from the others. Micro-batches are not accumulated where nothing says how many.
"""


def reference() -> str:
    """The page, as Markdown."""
    parts = [INTRODUCTION, "## Top level", _table(RootSection, "")]
    for path, section in _sections(RootSection, ""):
        parts += [f"## {path}", _lead(path, section), _table(section, f"{path}.")]
    return "\n\n".join(part.strip("\n") for part in [*parts, *_other_names(), *_not_built()] if part) + "\n"


def _sections(section: type[Section], path: str) -> Iterator[tuple[str, type[Section]]]:
    for name, field in section.model_fields.items():
        inner = section_class(field) or _item_section(field)
        if inner is not None:
            here = f"{path}{name}" + ("[]" if section_class(field) is None else "")
            yield here, inner
            yield from _sections(inner, f"{here}.")


def _item_section(field: FieldInfo) -> type[Section] | None:
    """The class of the items where the key is a list of sections."""
    items = get_args(field.annotation) if get_origin(field.annotation) is list else ()
    return next((item for item in items if isinstance(item, type) and issubclass(item, Section)), None)


def _lead(path: str, section: type[Section]) -> str:
    meaning = " ".join(inspect.cleandoc(section.__doc__ or "").split()).replace("``", "`")
    if path in SWITCHES:
        return f"{meaning} Not built yet: `enabled` must be false."
    return f"{meaning} No key has an effect yet." if path in IDLE else meaning


def _table(section: type[Section], path: str) -> str:
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for name, field in section.model_fields.items():
        if section_class(field) is not None:
            continue
        unit = unit_of(field)
        kind = _type(field.annotation) + (f", {unit}" if unit else "")
        default = "required" if field.default is PydanticUndefined else _code(field.default)
        names = [rename.old.split(".")[-1] for rename in RENAMES if f"{path}{name}" in rename.new and not rename.deprecated]
        also = f" Also `{'`, `'.join(names)}`." if names else ""
        only = f"Stage {stage_of(field)}: " if stage_of(field) else ""
        rows.append(f"| `{name}` | {kind} | {default} | {only}{field.description}{also} |")
    return "\n".join(rows) if len(rows) > 2 else ""


def _type(annotation: Any) -> str:
    """The type of a key in the words of JSON."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(arguments[0])
    if origin in (Union, UnionType):
        return " or ".join(_type(part) for part in arguments if part is not NoneType)
    if origin is Literal:
        return ", ".join(_code(word) for word in arguments)
    if origin is list:
        return f"list of {_type(arguments[0])}"
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return "object"
    words = {bool: "true or false", int: "integer", float: "number", str: "string"}
    return words.get(annotation, "object" if origin is dict else "any")


def _code(value: Any) -> str:
    return f"`{json.dumps(value)}`"


def _other_names() -> Iterator[str]:
    yield "## Deprecated names"
    yield "Each is mapped to the key that it means, with a warning. Both at once with different values are an error."
    rows = ["| name | use |", "|---|---|", "| `zero_optimization` as true or false | `zero_optimization.stage` 1 or 0 |"]
    for rename in RENAMES:
        if rename.deprecated:
            rows.append(f"| `{rename.old}` | `{'`, `'.join(rename.new)}` |")
    yield "\n".join(rows)


def _not_built() -> Iterator[str]:
    yield "## What is not built yet"
    yield "Switched on, each of these is an error:"
    lines = [f"- `{path}`: {sentence}" for path, _, sentence in UNBUILT]
    lines += [f"- `{section}.enabled`" for section in SWITCHES]
    yield "\n".join([*lines, f"- `optimizer.type`: {', '.join(OPTIMIZERS)}."])
    yield "## Values that are refused"
    yield "They ask for what is never done here:"
    yield "\n".join(f"- `{path}`: {sentence}" for path, _, sentence in ONLY)
