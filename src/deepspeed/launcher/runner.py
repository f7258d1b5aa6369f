"""The ``deepspeed`` command: decide how many ranks this machine runs, and run them.

Nodes other than this machine are not built yet: the options that ask for them are refused, never ignored.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from .arguments import parse_args
from .environment import DEEPSPEED_ENVIRONMENT_NAME, Node, chosen_variables, rank_variables
from .errors import LaunchError
from .node import RankCommand, run_ranks
from .resources import accelerator_count, available_cores, core_shares

__all__ = ["DEEPSPEED_ENVIRONMENT_NAME", "main", "parse_args"]

LOCALHOST = "localhost"
_SEVERAL_NODES = ("hostfile", "include", "exclude", "launcher_args", "force_multi", "no_ssh", "world_info")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code: 0, 2 for bad input, or as `deepspeed.launcher.node.run_ranks` says.

    A first argument of exactly ``config`` is no script (that is ``./config``) but the command that explains
    configurations.
    """
    arguments = sys.argv[1:] if argv is None else argv
    if arguments and arguments[0] == "config":
        from ..cli.config import main as explain_config

        return explain_config(arguments[1:])
    options = parse_args(arguments)
    if options.version:
        print(metadata.version("deepspeed"))
        return 0
    try:
        return _launch(options)
    except LaunchError as error:
        print(f"deepspeed: error: {error}", file=sys.stderr)
        return 2


def _launch(options: argparse.Namespace) -> int:
    asked = [f"--{name}" for name in _SEVERAL_NODES if getattr(options, name)]
    if options.num_nodes > 1:
        asked.append(f"--num_nodes {options.num_nodes}")
    if asked:
        raise LaunchError(f"{', '.join(asked)}: several nodes are not built yet; leave it out to run on this machine")
    count = accelerator_count()
    ranks = options.num_gpus if options.num_gpus != -1 else count or 1
    if count and ranks > count:
        raise LaunchError(f"--num_gpus {ranks} asks for {ranks - count} more processes than the {count} accelerators")
    address, port = options.master_addr or "127.0.0.1", options.master_port or _free_port()
    node = Node({LOCALHOST: list(range(ranks))}, 0, address, port, accelerators=count > 0)
    commands = _rank_commands(options, node)
    if not options.dry_run:
        return run_ranks(commands, host=node.host, grace_seconds=options.grace_period)
    for command in commands:
        setting = [f"{key}={value}" for key, value in command.variables.items()]
        print(shlex.join(["env", *setting, sys.executable, *command.arguments]))
    return 0


def _free_port() -> int:
    from torch.distributed.elastic.utils.distributed import get_free_port

    return int(get_free_port())


def _rank_commands(options: argparse.Namespace, node: Node) -> list[RankCommand]:
    """What each of the node's ranks runs: `deepspeed.launcher.worker` around the user's script."""
    kind = "program" if options.no_python else "module" if options.module else "script"
    if kind == "script" and not Path(options.user_script).exists():
        raise LaunchError(f"the script {options.user_script} does not exist; check the path, from {Path.cwd()}")
    shares = core_shares(available_cores(), len(node.slots))
    commands = []
    for local_rank, variables in enumerate(rank_variables(node, len(shares[0]), chosen_variables(options.env))):
        cores = ",".join(map(str, shares[local_rank])) if options.bind_cores_to_rank else "-"
        local = [] if options.no_local_rank or options.no_python else [f"--local_rank={local_rank}"]
        wrapper = ["-u", str(Path(__file__).with_name("worker.py")), str(os.getpid()), kind, cores]
        arguments = [*wrapper, options.user_script, *local, *options.user_args]
        commands.append(RankCommand(node.first_rank + local_rank, arguments, variables))
    return commands


if __name__ == "__main__":
    sys.exit(main())
