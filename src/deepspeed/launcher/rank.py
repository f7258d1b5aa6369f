"""One rank that another program has started: ``mpirun -n 8 python -m deepspeed.launcher.rank SCRIPT``, or by srun.

MPI launchers and Slurm start one process per rank and tell each its place in variables of their own. This entry turns
them into those that scripts expect (RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and their kin), then becomes the script.
"""

from __future__ import annotations

import argparse
import array
import fcntl
import os
import platform
import re
import signal
import socket
import stat
import sys
import termios
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from . import worker
from .arguments import DEFAULT_PORT, add_program_arguments
from .environment import allocator_settings, visible_devices
from .errors import LaunchError
from .program import Program, cores_of
from .resources import accelerator_count, available_cores, core_shares
from .world import World, decode_world_info


@dataclass(frozen=True)
class Source:
    """The variables in which a starter of ranks says who a rank is."""

    starter: str
    rank: str
    local_rank: str
    size: str
    local_size: str


SOURCES = (
    Source(
        "Open MPI",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    Source("MVAPICH", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE"),
    Source("MPICH or Intel MPI", "PMI_RANK", "MPI_LOCALRANKID", "PMI_SIZE", "MPI_LOCALNRANKS"),
    Source("PALS", "PMI_RANK", "PMI_LOCAL_RANK", "PMI_SIZE", "PMI_LOCAL_SIZE"),
    Source("Slurm", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_TASKS_PER_NODE"),
)
"""MPI before Slurm: within a Slurm job, mpirun's ranks have both, and Slurm's speak of the job."""

_REPEATED = re.compile(r"^(\d+)(?:\(x(\d+)\))?$")
_BRACKETS = re.compile(r"^([^\[,]*)\[(\w+)[^\]]*\]([^,]*)")


@dataclass(frozen=True)
class Place:
    """A rank's place among all ranks and among those of its node."""

    rank: int
    local_rank: int
    size: int
    local_size: int


def find_place(variables: Mapping[str, str]) -> Place:
    """The place that MPI or Slurm has given this process; LaunchError where neither has started it."""
    for source in SOURCES:
        names = (source.rank, source.local_rank, source.size, source.local_size)
        if all(name in variables for name in names):
            rank, local_rank, size = (int(variables[name]) for name in names[:3])
            return Place(rank, local_rank, size, _local_size(variables[source.local_size], variables))
    starters = ", ".join(source.starter for source in SOURCES)
    raise LaunchError(
        f"no variables of {starters} say which rank this is; start it by mpirun or srun, or use the deepspeed command"
    )


def _local_size(text: str, variables: Mapping[str, str]) -> int:
    """A number, or Slurm's list of them such as ``4(x2),1``, one per node."""
    counts: list[int] = []
    for part in text.split(","):
        match = _REPEATED.match(part)
        if match is None:
            raise LaunchError(f"cannot read the number of ranks per node from {text!r}; expected such as 4(x2),1")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts[int(variables.get("SLURM_NODEID", "0")) if len(counts) > 1 else 0]


def first_host(nodes: str) -> str:
    """The first of Slurm's list of hosts: ``gpu003`` of ``gpu[003-007,9],login1``."""
    match = _BRACKETS.match(nodes)
    if match is None:
        return nodes.partition(",")[0]
    return f"{match[1]}{match[2]}{match[3]}"


def master_address(variables: Mapping[str, str], place: Place) -> str:
    """Where rank 0 listens: MASTER_ADDR, this machine where all ranks are on it, or Slurm's first node."""
    if variables.get("MASTER_ADDR"):
        return variables["MASTER_ADDR"]
    if place.local_size == place.size:
        return "127.0.0.1"
    nodes = variables.get("SLURM_STEP_NODELIST") or variables.get("SLURM_JOB_NODELIST")
    if nodes:
        return first_host(nodes)
    raise LaunchError("ranks are on several nodes and MASTER_ADDR is not set; set it to the address of rank 0's node")


def slots_here(pool: Mapping[str, list[int]], place: Place, host: str) -> list[int]:
    """The slots of this node's ranks: by the node's name (as Slurm orders the nodes), else by the order of ranks."""
    if host not in pool:
        host = list(pool)[World(dict(pool), "", 0).node_of(place.rank)]
    slots = pool[host]
    if len(slots) != place.local_size:
        raise LaunchError(
            f"{host} runs {place.local_size} ranks and was to run {len(slots)}; let the launcher place the ranks: leave "
            "options that do so out of --launcher_args"
        )
    return slots


def rank_settings(
    variables: Mapping[str, str], pool: Mapping[str, list[int]], accelerators: bool, cores: int
) -> dict[str, str]:
    """The variables that a script gets, from those of its starter, the slots of each host (empty where nobody has
    said) and the number of cores that a rank may use."""
    place = find_place(variables)
    slots = slots_here(pool, place, variables.get("SLURMD_NODENAME", "")) if pool else list(range(place.local_size))
    defaults = {"OMP_NUM_THREADS": variables.get("SLURM_CPUS_PER_TASK", str(cores)), "MASTER_PORT": str(DEFAULT_PORT)}
    if not accelerators:
        defaults |= allocator_settings(variables)
    settings = {key: value for key, value in defaults.items() if key not in variables}
    if accelerators and pool:
        settings["CUDA_VISIBLE_DEVICES"] = visible_devices(slots, variables.get("CUDA_VISIBLE_DEVICES"))
    return settings | {
        "RANK": str(place.rank),
        "LOCAL_RANK": str(place.local_rank),
        "WORLD_SIZE": str(place.size),
        "LOCAL_SIZE": str(place.local_size),
        "LOCAL_WORLD_SIZE": str(place.local_size),
        "MASTER_ADDR": master_address(variables, place),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Become the rank; returns only where it cannot be found or the script has run to its end."""
    parser = argparse.ArgumentParser(prog="python -m deepspeed.launcher.rank", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--world_info", default="", help="base64 of the hosts and their slots (default: as started)")
    add_program_arguments(parser)
    options = parser.parse_args(argv)
    if not options.user_script:
        parser.error("no script given; expected: python -m deepspeed.launcher.rank [options] SCRIPT [arguments]")
    worker.end_with(os.getppid(), signal.SIGKILL)
    try:
        _become(Program.from_options(options), decode_world_info(options.world_info) if options.world_info else {})
    except LaunchError as error:
        print(f"deepspeed: error: {error}", file=sys.stderr)
        return 2
    return 0


def _become(program: Program, pool: Mapping[str, list[int]]) -> None:
    program.check()
    place = find_place(os.environ)
    cores = cores_of(program, available_cores(), f"rank {place.rank}'s node")
    share = core_shares(cores, place.local_size)[place.local_rank]
    os.environ.update(rank_settings(os.environ, pool, accelerator_count() > 0, len(share)))
    if program.bind_cores:
        os.sched_setaffinity(0, set(share))
    if program.log_folder:
        worker.redirect(Path(program.log_folder) / f"rank_{place.rank}.log")
    command = program.script_arguments(place.local_rank)
    if program.kind == "program":
        worker.execute(command)
    sys.argv[:] = command
    try:
        worker.run(program.kind, command[0])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if 0 < code < 128:  # above, a signal has ended the script: so it has the other ranks, which may be saving
            end_job(os.environ, code)
        raise
    except Exception as error:
        worker.show(error)
        print(f"deepspeed: rank {place.rank} failed on {platform.node()}", file=sys.stderr, flush=True)
        end_job(os.environ, 1)
        sys.exit(1)


def end_job(variables: Mapping[str, str], code: int) -> None:
    """Have MPICH's kin of launchers (Hydra) end the other ranks and return ``code``. The other launchers do so by
    themselves when a rank fails; Hydra does for signals, and otherwise waits for an ``abort`` of its PMI protocol.
    It drops what it has not read by then, so that what this rank has said is waited for."""
    if "MPI_LOCALRANKID" not in variables or "PMI_FD" not in variables:
        return
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
            if stat.S_ISFIFO(os.fstat(stream.fileno()).st_mode):
                wait_until_read(stream.fileno(), limit=5.0)
    with suppress(OSError, ValueError), socket.socket(fileno=int(variables["PMI_FD"])) as hydra:
        hydra.sendall(f"cmd=abort exitcode={code}\n".encode())


def wait_until_read(pipe: int, limit: float) -> bool:
    """Whether the other end of ``pipe`` has read all that was written, within ``limit`` seconds."""
    deadline = time.monotonic() + limit
    unread = array.array("i", [1])
    while True:
        fcntl.ioctl(pipe, termios.FIONREAD, unread)
        if not unread[0]:
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.001)


if __name__ == "__main__":
    sys.exit(main())
