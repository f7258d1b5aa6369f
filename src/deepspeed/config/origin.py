"""Where an effective value of the configuration came from."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Kind(Enum):
    """The ways in which a key comes by its value."""

    DEFAULT = "default"
    GIVEN = "given"
    RENAMED = "given under another name"
    SOLVED = "solved from the other batch sizes"
    AUTO = "auto"


@dataclass(frozen=True)
class Origin:
    """A way, and what there is to say about it."""

    kind: Kind
    detail: str = ""

    def __str__(self) -> str:
        return self.detail or self.kind.value


DEFAULT = Origin(Kind.DEFAULT)
GIVEN = Origin(Kind.GIVEN)
