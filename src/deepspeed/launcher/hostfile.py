"""Which hosts and slots a launch uses: the hostfile, and the filters ``--include`` and ``--exclude``.

A *resource pool* maps each host to its number of slots; *active resources* map it to the slots that get a rank.
A slot is an accelerator of its host, or a place for a CPU rank where it has none.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from .errors import LaunchError

_LINE = re.compile(r"^(\S+)\s+slots=(\d+)$")


def fetch_hostfile(hostfile_path: str | Path | None) -> dict[str, int] | None:
    """The resource pool in a file of lines ``hostname slots=8``, in the file's order; None where there is no file.

    Blank lines and what follows a ``#`` are skipped. Raises LaunchError with file and line for a malformed line, a
    host that stands there twice or a host without slots, and for a file without hosts.
    """
    if hostfile_path is None or not Path(hostfile_path).is_file():
        return None
    pool: dict[str, int] = {}
    for number, text in enumerate(Path(hostfile_path).read_text(encoding="utf-8").splitlines(), start=1):
        line = text.partition("#")[0].strip()
        if not line:
            continue
        where = f"{hostfile_path}, line {number}"
        match = _LINE.match(line)
        if match is None:
            raise LaunchError(f"{where}: {line!r} is not of the form 'hostname slots=8'; correct it")
        host, slots = match[1], int(match[2])
        if host in pool:
            raise LaunchError(f"{where}: host {host} stands there twice; give it one line with all its slots")
        if slots == 0:
            raise LaunchError(f"{where}: host {host} has no slots; expected 1 or more, or leave out the line")
        pool[host] = slots
    if not pool:
        raise LaunchError(f"{hostfile_path} names no host; expected lines of the form 'hostname slots=8'")
    return pool


def parse_inclusion_exclusion(resource_pool: Mapping[str, int], inclusion: str, exclusion: str) -> dict[str, list[int]]:
    """The active resources of a pool of slot counts, as `parse_resource_filter` says."""
    slots = {host: list(range(count)) for host, count in resource_pool.items()}
    return parse_resource_filter(slots, include_str=inclusion, exclude_str=exclusion)


def parse_resource_filter(
    host_info: Mapping[str, list[int]], include_str: str = "", exclude_str: str = ""
) -> dict[str, list[int]]:
    """The hosts and slots that a filter leaves, in the order of ``host_info``.

    A filter is ``host1@host2:0,2``: hosts with ``@`` between them, each whole or with the slots meant. Raises
    LaunchError for a host or slot that is not in ``host_info``, when both filters are given, and when nothing is left.
    """
    if include_str and exclude_str:
        raise LaunchError("--include and --exclude contradict each other; give one of them")
    if include_str:
        chosen = _parse_filter("--include", include_str, host_info)
        return {host: sorted(chosen[host]) for host in host_info if host in chosen}
    if not exclude_str:
        return {host: list(slots) for host, slots in host_info.items()}
    dropped = _parse_filter("--exclude", exclude_str, host_info)
    left = {host: [slot for slot in slots if slot not in dropped.get(host, ())] for host, slots in host_info.items()}
    left = {host: slots for host, slots in left.items() if slots}
    if not left:
        raise LaunchError(f"--exclude {exclude_str}: no slot is left to run on; exclude less")
    return left


def _parse_filter(option: str, text: str, known: Mapping[str, list[int]]) -> dict[str, set[int]]:
    chosen: dict[str, set[int]] = {}
    for part in text.split("@"):
        host, colon, slots = part.strip().partition(":")
        where = f"{option} {text}"
        if host not in known:
            raise LaunchError(f"{where}: unknown host {host!r}; known hosts: {', '.join(known)}")
        if not colon:
            chosen.setdefault(host, set()).update(known[host])
            continue
        for slot in slots.split(","):
            if not slot.strip().isdecimal():
                raise LaunchError(f"{where}: {slot!r} is not a slot of {host}; expected host:0,2 with slots as numbers")
            if int(slot) not in known[host]:
                raise LaunchError(f"{where}: {host} has no slot {slot}; its slots: {', '.join(map(str, known[host]))}")
            chosen.setdefault(host, set()).add(int(slot))
    return chosen
