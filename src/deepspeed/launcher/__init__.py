"""Starting ranks: the ``deepspeed`` command, So far on one machine."""

from __future__ import annotations
