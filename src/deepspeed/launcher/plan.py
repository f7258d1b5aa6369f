"""From the command line to a plan: which hosts and slots get ranks, where rank 0 listens, and what starts them."""

from __future__ import annotations

import argparse
import os
import shlex
import socket
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

from .arguments import DEFAULT_HOSTFILE, DEFAULT_LAUNCHER, DEFAULT_PORT
from .environment import exported_variables
from .errors import LaunchError
from .hostfile import fetch_hostfile, parse_inclusion_exclusion
from .multinode_runner import PDSH_SSH_ARGUMENTS, RUNNERS, Job, MultiNodeRunner
from .program import Program
from .resources import accelerator_count, available_cores
from .world import World

LOCALHOST = "localhost"
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Plan:
    """A launch. Without a ``runner`` this machine starts its own ranks itself, as node ``node_rank`` of the world."""

    world: World
    node_rank: int = 0
    runner: MultiNodeRunner | None = None


def make_plan(options: argparse.Namespace, chosen: dict[str, str]) -> Plan:
    """The plan for a parsed command line; ``chosen`` are the variables that the user names. Raises LaunchError for a
    wrong hostfile, an unknown host or slot, and more processes than slots."""
    hosts = _hosts(options)
    pool = _trim(hosts.slots, options) if hosts.named else hosts.slots
    single = len(pool) == 1 and not options.no_ssh
    here = single and _is_this_machine(next(iter(pool)))
    port = options.master_port or (_free_port() if here else DEFAULT_PORT)
    if options.no_ssh or (here and not options.launcher and not options.force_multi):
        return Plan(World(pool, _master_address(options, pool, hosts.named), port), max(options.node_rank, 0))
    launcher = options.launcher or DEFAULT_LAUNCHER
    asks_slurm = launcher == "slurm" and not options.master_addr
    address = "" if asks_slurm else _master_address(options, pool, hosts.named)
    arguments = tuple(shlex.split(options.launcher_args))
    job = Job(
        world=World(pool, address, port),
        program=Program.from_options(options),
        exports=exported_variables(chosen),
        folder=str(Path.cwd()),
        extra_arguments=() if launcher == "ssh" else arguments,
        ssh_arguments=arguments if launcher == "ssh" else tuple(shlex.split(os.environ.get(PDSH_SSH_ARGUMENTS, ""))),
        ssh_port=options.ssh_port,
        hosts_named=hosts.named,
    )
    return Plan(job.world, runner=RUNNERS[launcher](job))


@dataclass(frozen=True)
class _Hosts:
    """The slots of each host. Where nobody has named the hosts, the names only count them."""

    slots: dict[str, list[int]]
    named: bool = True


def _hosts(options: argparse.Namespace) -> _Hosts:
    """The hosts of the hostfile, or as many as the options count, or this machine."""
    pool = fetch_hostfile(options.hostfile or DEFAULT_HOSTFILE)
    if pool is not None:
        return _Hosts(parse_inclusion_exclusion(pool, options.include, options.exclude))
    if options.num_nodes > 1 or options.no_ssh or options.launcher == "slurm":
        return _counted_hosts(options)
    count = accelerator_count()
    if options.include or options.exclude:
        slots = count or len(available_cores())
        return _Hosts(parse_inclusion_exclusion({LOCALHOST: slots}, options.include, options.exclude))
    ranks = options.num_gpus if options.num_gpus != -1 else count or 1
    return _Hosts({LOCALHOST: list(range(ranks if count == 0 else count))})


def _counted_hosts(options: argparse.Namespace) -> _Hosts:
    """Nodes that nobody has named, all alike."""
    if not options.no_ssh and options.launcher != "slurm":
        raise LaunchError(
            f"--num_nodes {options.num_nodes} needs a hostfile with lines 'hostname slots=8' (--hostfile FILE); "
            "without one use --no_ssh on each node, or --launcher slurm"
        )
    if options.include or options.exclude:
        raise LaunchError("--include and --exclude choose among the hosts of a hostfile; give one (--hostfile FILE)")
    if options.num_nodes == -1 and options.no_ssh:
        raise LaunchError("--no_ssh needs to know the nodes: give --num_nodes N with --num_gpus N, or --hostfile FILE")
    ranks = options.num_gpus if options.num_gpus != -1 else accelerator_count()
    if ranks == 0:
        raise LaunchError("how many ranks on each node? This machine has no accelerators to count; give --num_gpus N")
    return _Hosts({f"node{place}": list(range(ranks)) for place in range(max(options.num_nodes, 1))}, named=False)


def _trim(pool: dict[str, list[int]], options: argparse.Namespace) -> dict[str, list[int]]:
    """The first ``--num_nodes`` hosts and, of each, the first ``--num_gpus`` slots."""
    nodes, ranks = options.num_nodes, options.num_gpus
    if nodes > len(pool):
        raise LaunchError(f"--num_nodes {nodes} asks for more nodes than the {len(pool)} hosts: {', '.join(pool)}")
    pool = dict(list(pool.items())[: nodes if nodes != -1 else None])
    for host, slots in pool.items():
        if ranks > len(slots):
            raise LaunchError(f"--num_gpus {ranks} asks for more processes than the {len(slots)} slots of {host}")
    return {host: slots[: ranks if ranks != -1 else None] for host, slots in pool.items()}


def _master_address(options: argparse.Namespace, pool: dict[str, list[int]], named: bool) -> str:
    """Where rank 0 listens: as the user says, or the first host."""
    if options.master_addr:
        return str(options.master_addr)
    if len(pool) == 1 and (not named or _is_this_machine(next(iter(pool)))):
        return LOOPBACK
    if not named:
        raise LaunchError("--no_ssh without a hostfile needs --master_addr HOST: the address of node 0")
    first, *others = pool
    beyond = [host for host in others if not _is_loopback(host)]
    if _is_loopback(first) and beyond:
        raise LaunchError(f"{beyond[0]} cannot reach rank 0 at {first}; give --master_addr with an address that it can")
    return first


def _is_this_machine(host: str) -> bool:
    return _is_loopback(host) or host in (socket.gethostname(), socket.getfqdn())


def _is_loopback(host: str) -> bool:
    """Whether a name means the machine itself to whoever uses it: ``localhost``, ``127.0.0.2``, ``::1``."""
    try:
        return host == LOCALHOST or ip_address(host).is_loopback
    except ValueError:  # a name
        return False


def _free_port() -> int:
    from torch.distributed.elastic.utils.distributed import get_free_port

    return int(get_free_port())
