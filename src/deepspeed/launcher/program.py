"""What each rank runs: the user's script, module or program, and the commands that start it on one node."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from pathlib import Path

from .arguments import DEFAULT_GRACE_PERIOD
from .environment import rank_variables
from .errors import LaunchError
from .node import RankCommand
from .resources import available_cores, core_shares, parse_range_list
from .world import Node

WORKER = Path(__file__).with_name("worker.py")


@dataclass(frozen=True)
class Program:
    """What the user asks to run on every rank. ``target`` is a path, a module's name or a program, as ``kind`` says
    (``script``, ``module``, ``program``)."""

    kind: str
    target: str
    arguments: tuple[str, ...] = ()
    local_rank_argument: bool = True
    bind_cores: bool = False
    core_list: str = ""
    log_folder: str = ""
    grace_seconds: float = DEFAULT_GRACE_PERIOD

    @classmethod
    def from_options(cls, options: argparse.Namespace) -> Program:
        """The program that `deepspeed.launcher.arguments.add_program_arguments` has parsed."""
        kind = "program" if options.no_python else "module" if options.module else "script"
        return cls(
            kind=kind,
            target=options.user_script,
            arguments=tuple(options.user_args),
            local_rank_argument=not (options.no_local_rank or options.no_python),
            bind_cores=bool(options.bind_cores_to_rank or options.bind_core_list),
            core_list=options.bind_core_list,
            log_folder=options.enable_each_rank_log,
            grace_seconds=options.grace_period,
        )

    def check(self) -> None:
        """Raise LaunchError where a script is not there to run."""
        if self.kind == "script" and not Path(self.target).exists():
            raise LaunchError(f"the script {self.target} does not exist; check the path, from {Path.cwd()}")

    def to_arguments(self) -> list[str]:
        """The command-line arguments from which another node's entry makes the same program."""
        flags = {
            "--module": self.kind == "module",
            "--no_python": self.kind == "program",
            "--no_local_rank": self.kind != "program" and not self.local_rank_argument,
            "--bind_cores_to_rank": self.bind_cores and not self.core_list,
            f"--bind_core_list={self.core_list}": bool(self.core_list),
            f"--enable_each_rank_log={self.log_folder}": bool(self.log_folder),
            f"--grace_period={self.grace_seconds:g}": self.grace_seconds != DEFAULT_GRACE_PERIOD,
        }
        return [*(flag for flag, given in flags.items() if given), self.target, *self.arguments]

    def script_arguments(self, local_rank: int) -> list[str]:
        """The target and its arguments on one rank."""
        local = [f"--local_rank={local_rank}"] if self.local_rank_argument else []
        return [self.target, *local, *self.arguments]


def rank_commands(program: Program, node: Node, chosen: dict[str, str]) -> list[RankCommand]:
    """What each of the node's ranks runs: `deepspeed.launcher.worker` around the program. ``chosen`` are the variables
    that the user names for this launch. Raises LaunchError where there is no such script, or no such core."""
    program.check()
    shares = core_shares(cores_of(program, available_cores(), node.host), len(node.slots))
    commands = []
    for local_rank, variables in enumerate(rank_variables(node, len(shares[0]), chosen)):
        rank = node.first_rank + local_rank
        pinned = ",".join(map(str, shares[local_rank])) if program.bind_cores else "-"
        log = str(Path(program.log_folder) / f"rank_{rank}.log") if program.log_folder else "-"
        wrapper = ["-u", str(WORKER), str(os.getpid()), program.kind, pinned, log]
        commands.append(RankCommand(rank, [*wrapper, *program.script_arguments(local_rank)], variables))
    return commands


def cores_of(program: Program, available: list[int], host: str) -> list[int]:
    """The cores that ranks share: the available ones, or those of them that the user lists. LaunchError for others."""
    if not program.core_list:
        return available
    cores = parse_range_list(program.core_list)
    missing = sorted(set(cores) - set(available))
    if missing:
        raise LaunchError(
            f"--bind_core_list {program.core_list}: {host} offers no core {', '.join(map(str, missing))}; "
            f"available: {', '.join(map(str, available))}"
        )
    return cores
