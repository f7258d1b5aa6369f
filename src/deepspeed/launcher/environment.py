"""Environment variables: those that the user names for a launch, and those that each rank gets.

A variable that the user has set is never overwritten by a choice of the launcher, save for the names that say who
the rank is (RANK and its kin).
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from .errors import LaunchError
from .world import Node

DEEPSPEED_ENVIRONMENT_NAME = os.environ.get("DS_ENV_FILE", ".deepspeed_env")

# Blocks from this size on are mapped, so that freeing one returns its pages to the system at once. With glibc's own
# moving threshold (up to 32 MiB), freed gradients and activations stay resident in its heaps: FSDP2's peak on a
# 60 M-parameter GPT falls from 1844 to 878 MB with this value.
MMAP_THRESHOLD_NBYTES = 65536

# torch then aligns tensors from 2 MiB on to pages, which it asks the kernel to make large ones. Faults are fewer, and O_DIRECT
# takes the memory without a copy.
_ALIGNED_TENSORS = {"THP_MEM_ALLOC_ENABLE": "1"}

# Variables of this machine that go to the other nodes: they set up Python and the communication libraries.
_PROPAGATED = ("PYTHON", "NCCL_", "GLOO_", "UCX_", "MV2_", "OMP_NUM_THREADS", "DS_ACCELERATOR")

_KEY = re.compile(r"^[A-Za-z_][A-Za-z0-9_]*$")


def parse_assignment(text: str, where: str) -> tuple[str, str]:
    """``KEY=VALUE`` as a pair. ``where`` opens the error's message: the option, or file and line."""
    key, equals, value = text.partition("=")
    key = key.strip().removeprefix("export ").strip()
    if not equals or not _KEY.match(key):
        raise LaunchError(f"{where}: {text!r} is not of the form KEY=VALUE; correct it")
    return key, value.strip()


def read_environment_files(name: str | None = None, folders: Iterable[Path] | None = None) -> dict[str, str]:
    """Variables of ``.deepspeed_env`` in the home and then the current folder; the later file wins."""
    found: dict[str, str] = {}
    for folder in folders if folders is not None else (Path.home(), Path.cwd()):
        path = folder / (name or DEEPSPEED_ENVIRONMENT_NAME)
        if not path.is_file():
            continue
        for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            line = text.strip()
            if line and not line.startswith("#"):
                key, value = parse_assignment(line, f"{path}, line {number}")
                found[key] = value
    return found


def chosen_variables(assignments: Iterable[str]) -> dict[str, str]:
    """What the user names for this launch: ``.deepspeed_env``, then ``--env KEY=VALUE``; the later wins."""
    variables = read_environment_files()
    variables.update(parse_assignment(text, "--env") for text in assignments)
    return variables


def exported_variables(chosen: Mapping[str, str]) -> dict[str, str]:
    """What ranks on other nodes get besides their own nodes' variables: those that set up libraries here, and the
    ones that the user names for this launch."""
    inherited = {key: value for key, value in os.environ.items() if key.startswith(_PROPAGATED)}
    return {**dict(sorted(inherited.items())), **chosen}


def allocator_settings(surroundings: Mapping[str, str]) -> dict[str, str]:
    """Settings with which a CPU rank's large tensors begin at pages, and its resident set follows its live bytes: the latter
    not off glibc or where the user set one."""
    if platform.libc_ver()[0] != "glibc" or "mmap_threshold" in surroundings.get("GLIBC_TUNABLES", ""):
        return _ALIGNED_TENSORS
    return {**_ALIGNED_TENSORS, "MALLOC_MMAP_THRESHOLD_": str(MMAP_THRESHOLD_NBYTES)}


def rank_variables(node: Node, threads: int, chosen: Mapping[str, str]) -> list[dict[str, str]]:
    """The variables that each local rank gets over the launcher's own; ``threads`` is a rank's share of the cores."""
    surroundings = {**os.environ, **chosen}
    defaults = {"OMP_NUM_THREADS": str(threads)}
    if not node.accelerators:
        defaults |= allocator_settings(surroundings)
    common = {key: value for key, value in defaults.items() if key not in surroundings} | dict(chosen)
    if node.accelerators:
        common["CUDA_VISIBLE_DEVICES"] = visible_devices(node.slots, surroundings.get("CUDA_VISIBLE_DEVICES"))
    local_size = str(len(node.slots))
    common |= {
        "WORLD_SIZE": str(node.world.size),
        "LOCAL_WORLD_SIZE": local_size,
        "LOCAL_SIZE": local_size,
        "GROUP_RANK": str(node.rank),
        "MASTER_ADDR": node.world.master_addr,
        "MASTER_PORT": str(node.world.master_port),
    }
    return [
        common | {"RANK": str(node.first_rank + local_rank), "LOCAL_RANK": str(local_rank)}
        for local_rank in range(len(node.slots))
    ]


def visible_devices(slots: list[int], inherited: str | None) -> str:
    """CUDA_VISIBLE_DEVICES for the slots, which count among the devices that are already visible, if so restricted."""
    devices = [device.strip() for device in inherited.split(",")] if inherited else []
    return ",".join(devices[slot] if slot < len(devices) else str(slot) for slot in slots)
