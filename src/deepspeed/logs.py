"""The package's logger. Records go where the program's own logging sends them, and to standard error where it has none.

Messages of information are on by default: there are few, and only those that a configuration asks for repeat.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence


class _WhereNobodyListens(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes to standard error unless the root logger has handlers, which get the record anyway."""

    def emit(self, record: logging.LogRecord) -> None:
        if not logging.getLogger().handlers:
            super().emit(record)


def _make_logger() -> logging.Logger:
    made = logging.getLogger("DeepSpeed")
    if not made.handlers:
        handler = _WhereNobodyListens()
        handler.setFormatter(logging.Formatter("[%(asctime)s] [%(levelname)s] %(message)s"))
        made.addHandler(handler)
        made.setLevel(logging.INFO)
    return made


logger = _make_logger()


def log_dist(message: str, ranks: Sequence[int] | None = None, level: int = logging.INFO) -> None:
    """Log ``message`` on the global ``ranks`` only, with the rank in front; on all where None or where -1 is among
    them. A process outside a process group is rank 0."""
    from torch import distributed as dist

    rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
    if ranks is None or rank in ranks or -1 in ranks:
        logger.log(level, "[Rank %d] %s", rank, message)
