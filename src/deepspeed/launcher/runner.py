"""The ``deepspeed`` command: plan a launch, then start this machine's ranks or the commands that start all nodes'."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

from .. import __version__
from .arguments import REMOTE_SHELLS, parse_args
from .environment import DEEPSPEED_ENVIRONMENT_NAME, chosen_variables
from .errors import LaunchError
from .hostfile import fetch_hostfile, parse_inclusion_exclusion, parse_resource_filter
from .launch import attend_peers, make_node, run_node
from .multinode_runner import MultiNodeRunner
from .plan import Plan, make_plan
from .program import Program, rank_commands
from .world import encode_world_info

__all__ = [
    "DEEPSPEED_ENVIRONMENT_NAME",
    "encode_world_info",
    "fetch_hostfile",
    "main",
    "parse_args",
    "parse_inclusion_exclusion",
    "parse_resource_filter",
]

COMMANDS = {
    "config": "deepspeed.cli.config",
    "convert": "deepspeed.cli.convert",
    "inspect": "deepspeed.cli.inspect",
    "nvme-bench": "deepspeed.cli.nvme_bench",
    "plan": "deepspeed.cli.plan",
}
"""Commands besides training, and the modules that run them."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code: 0, 2 for bad input, or as `deepspeed.launcher.node.run_ranks` says.

    A first argument that is one of COMMANDS is no script (that is ``./config``) but a command of its own.
    """
    arguments = sys.argv[1:] if argv is None else argv
    if arguments and arguments[0] in COMMANDS:
        command = importlib.import_module(COMMANDS[arguments[0]])
        return int(command.main(arguments[1:]))
    options = parse_args(arguments)
    if options.version:
        print(__version__)
        return 0
    try:
        program, chosen = Program.from_options(options), chosen_variables(options.env)
        plan = make_plan(options, chosen)
        if options.dry_run:
            print("\n".join(_command_lines(plan, program, chosen)))
            return 0
        with _process_id_file() if options.save_pid else nullcontext():
            return _run(plan, program, chosen, options)
    except LaunchError as error:
        print(f"deepspeed: error: {error}", file=sys.stderr)
        return 2


def _run(plan: Plan, program: Program, chosen: dict[str, str], options: argparse.Namespace) -> int:
    if plan.runner is not None:
        return _run_elsewhere(plan.runner, program, check_ssh=not options.no_ssh_check)
    node = make_node(plan.world, plan.node_rank)
    return run_node(program, node, chosen=chosen, attend=attend_peers(node))


def _run_elsewhere(runner: MultiNodeRunner, program: Program, *, check_ssh: bool) -> int:
    from .remote import check_reachable, run_commands

    commands = runner.commands()
    if not runner.backend_exists():
        raise LaunchError(
            f"--launcher {runner.name} needs {runner.executable}, which is not on this machine's PATH; install it, or "
            "choose another launcher"
        )
    if check_ssh and runner.name in REMOTE_SHELLS:
        check_reachable(runner.job)
    return run_commands(commands, grace_seconds=program.grace_seconds)


def _command_lines(plan: Plan, program: Program, chosen: dict[str, str]) -> list[str]:
    """What would be run, for a shell: the runner's commands, or those of this machine's ranks."""
    if plan.runner is not None:
        return [command.shell_line() for command in plan.runner.commands()]
    commands = rank_commands(program, make_node(plan.world, plan.node_rank), chosen)
    return [command.shell_line() for command in commands]


@contextmanager
def _process_id_file() -> Iterator[None]:
    """The launcher's process id in /tmp/PID.ds, for a program that has started it; removed at the end."""
    path = Path(tempfile.gettempdir()) / f"{os.getpid()}.ds"
    path.write_text(str(os.getpid()))
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
