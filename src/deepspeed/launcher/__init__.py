"""Starting ranks, on one machine or on many: the ``deepspeed`` command."""

from __future__ import annotations
