"""Read a configuration from where it is: a file, a mapping, a JSON string or base64 of one."""

from __future__ import annotations

import base64
import binascii
import copy
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import ConfigError, shown


class _DuplicateKeyError(Exception):
    """A key that is written twice in one JSON object."""


def read_source(source: str | os.PathLike[str] | Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """The configuration as plain dictionaries that share nothing with ``source``, and words for where it came from.

    A string is JSON where it begins with ``{`` (or ``[``, to be told what is wrong with that), else the path of a file
    where there is one, else base64 of JSON.
    """
    if isinstance(source, Mapping):
        try:
            return _plain(source, ""), "the configuration"
        except RecursionError:
            raise ConfigError("the configuration: dictionaries are nested too deeply, or contain themselves") from None
    if isinstance(source, os.PathLike):
        return _read_file(Path(source))
    if not isinstance(source, str):
        raise ConfigError(
            f"a configuration is a path, a dictionary, a JSON string or base64 of one; found {type(source).__name__}"
        )
    if source.lstrip().startswith(("{", "[")):
        return _parse(source, "the JSON string"), "the JSON string"
    if len(source) < 4096 and os.path.lexists(source):
        return _read_file(Path(source))
    decoded = _decode_base64(source)
    if decoded is None:
        raise ConfigError(
            f"{shown(source)} is neither an existing file, nor JSON (which begins with '{{'), nor base64 of JSON. "
            f"Relative paths are read from {Path.cwd()}."
        )
    return _parse(decoded, "the base64 string"), "the base64 string"


def _read_file(path: Path) -> tuple[dict[str, Any], str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not a text file in UTF-8 ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from None
    if not text.strip():
        raise ConfigError(f"{path} is empty; a configuration is a JSON object {{...}}")
    return _parse(text, str(path)), str(path)


def _decode_base64(text: str) -> str | None:
    """The JSON text in ``text``, or None where it is no base64 of one."""
    packed = "".join(text.split())
    try:
        standard = packed.replace("-", "+").replace("_", "/")
        decoded = base64.b64decode(standard + "=" * (-len(standard) % 4), validate=True).decode("utf-8")
    except (binascii.Error, ValueError):
        return None
    return decoded if decoded.lstrip().startswith("{") else None


def _parse(text: str, origin: str) -> dict[str, Any]:
    try:
        value = json.loads(text, object_pairs_hook=_unique_pairs)
    except json.JSONDecodeError as error:
        lines = text.splitlines() or [""]
        line = lines[min(error.lineno, len(lines)) - 1]
        first = max(0, error.colno - 60)
        excerpt = line[first : first + 100]
        raise ConfigError(
            f"{origin}, line {error.lineno}, column {error.colno}: this is not JSON: {error.msg}\n"
            f"    {excerpt}\n    {' ' * (error.colno - 1 - first)}^"
        ) from None
    except _DuplicateKeyError as error:
        key = str(error)
        pattern = re.compile(re.escape(json.dumps(key, ensure_ascii=False)) + r"\s*:")
        found = [str(text.count("\n", 0, match.start()) + 1) for match in pattern.finditer(text)]
        raise ConfigError(
            f"{origin}: the key '{key}' is written twice in one object (see lines {', '.join(found)}). Keep one of them."
        ) from None
    except RecursionError:
        raise ConfigError(f"{origin}: objects are nested too deeply") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{origin}: a configuration is a JSON object {{...}}; found {shown(value)}")
    return value


def _unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise _DuplicateKeyError(key)
        result[key] = value
    return result


def _plain(value: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Mappings of any class as plain dictionaries; everything else copied as it is."""
    result: dict[str, Any] = {}
    for key, item in value.items():
        if not isinstance(key, str):
            raise ConfigError(f"{path or 'the configuration'}: keys are strings; found the key {key!r}")
        inner = f"{path}.{key}" if path else key
        result[key] = _plain(item, inner) if isinstance(item, Mapping) else copy.deepcopy(item)
    return result
