"""Ranks of one host talk through memory: whether a group can, and its memory.

All ranks of a group agree on it when the first communicator of the group is made: they are on one host, as one user, and all
have found the memory that the first of them made. Otherwise the group goes on by torch.distributed.
"""

from __future__ import annotations

import os
import pickle
import weakref
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..logs import logger
from ..native.hosts import HostGroup, Kind, Place, SharedMemory
from .groups import actual, group_timeout

SWITCH = "DEEPSPEED_HOST_TRANSPORT"


def host_group(group: dist.ProcessGroup | None) -> HostGroup | None:
    """The collectives of ``group`` (the default group where it is None) through memory, None where there are none. Called
    on all its ranks."""
    found = actual(group)
    if found not in _GROUPS:
        _GROUPS[found] = _agree(found)
    return _GROUPS[found]


def host_name() -> str:
    """What processes have in common that can share memory."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {Path('/proc/self/ns/pid').readlink()} {os.getuid()}"


def gather_objects(group: HostGroup, value: object, *, rank: int, size: int) -> list[Any]:
    """Every rank's ``value`` in rank order; this is ``rank`` of ``size``."""
    mine = pickle.dumps(value)
    lengths = torch.zeros(size, dtype=torch.int64)
    lengths[rank] = len(mine)
    group.begin(Kind.all_gather, lengths).wait()
    rows = torch.zeros(size, int(lengths.max()), dtype=torch.uint8)
    rows[rank, : len(mine)] = torch.frombuffer(bytearray(mine), dtype=torch.uint8)
    group.begin(Kind.all_gather, rows).wait()
    return [pickle.loads(row[:length].numpy().tobytes()) for row, length in zip(rows, lengths.tolist(), strict=True)]


def _agree(group: dist.ProcessGroup) -> HostGroup | None:
    ranks = dist.get_process_group_ranks(group)
    rank = dist.get_rank()
    first = rank == ranks[0]
    memory: SharedMemory | None = None
    place: Place | None = None
    try:
        name, refusal = host_name(), _refusal()
        if first and not refusal:
            memory = SharedMemory(len(ranks))
            place = memory.place(os.getpid())
    except (OSError, RuntimeError) as error:
        name, refusal = "", str(error)
    everyone = _gather((name, os.getpid(), place, refusal), group)
    names, pids, places, refusals = zip(*everyone, strict=True)
    if len(set(names)) > 1 or any(refusals):
        _do_without(refusals, first)
        return None
    found: HostGroup | None = None
    refusal = ""
    try:
        if memory is None:
            memory = SharedMemory(len(ranks), places[0])
        found = HostGroup(memory, rank, ranks, pids, group_timeout(group))
    except (OSError, RuntimeError) as error:
        refusal = str(error)
    refusals = tuple(_gather(refusal, group))
    if memory is not None:
        memory.hide()
    if any(refusals):
        if found is not None:
            found.close()
        _do_without(refusals, first)
        return None
    return found


def _refusal() -> str:
    return "off" if os.environ.get(SWITCH, "1").lower() in ("0", "false", "off") else ""


def _do_without(refusals: tuple[str, ...], speaks: bool) -> None:
    """Say once why, where it is neither a matter of choice nor of hosts."""
    reasons = [f"rank {index}: {text}" for index, text in enumerate(refusals) if text not in ("", "off")]
    if reasons and speaks:
        logger.warning("ranks of this host do not talk through shared memory but through sockets: %s", reasons[0])


def _gather(value: object, group: dist.ProcessGroup) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


_GROUPS: weakref.WeakKeyDictionary[dist.ProcessGroup, HostGroup | None] = weakref.WeakKeyDictionary()
