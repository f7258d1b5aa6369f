"""What is wrong with a configuration, said to the person who wrote it."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..logs import log_dist


class ConfigError(ValueError):
    """A configuration that cannot be used. The message lists all of its problems, each with path, value and remedy."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: where (dotted path), and a sentence that says what was found and what to do."""

    path: str
    sentence: str

    def __str__(self) -> str:
        return f"{self.path}: {self.sentence}" if self.path else self.sentence


def shown(value: Any, limit: int = 80) -> str:
    """``value`` as JSON on one line, shortened to ``limit`` characters."""
    try:
        text = json.dumps(value, default=repr)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def warn(message: str) -> None:
    """Log a warning, once for all ranks: they read the same configuration."""
    log_dist(message, [0], logging.WARNING)


def raise_problems(problems: Sequence[Problem], origin: str) -> None:
    """Raise one ConfigError with all ``problems`` of the configuration ``origin``; return where there are none."""
    if not problems:
        return
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    lines = [f"{count} in {origin}:", *(f"  - {problem}" for problem in problems)]
    raise ConfigError("\n".join(lines))
