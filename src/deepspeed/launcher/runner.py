"""The ``deepspeed`` command: run a script as several ranks on this machine.

Ranks are started and watched by torch's elastic multiprocessing. When one fails, its last lines of error output are
shown with the reason, the others are taken down, and the command returns a non-zero code.
"""

from __future__ import annotations

import argparse
import signal
import socket
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from .arguments import parse_args
from .environment import DEEPSPEED_ENVIRONMENT_NAME, Node, chosen_variables, rank_variables
from .errors import LaunchError
from .resources import accelerator_count, available_cores, core_shares

__all__ = ["DEEPSPEED_ENVIRONMENT_NAME", "main", "parse_args"]

SHOWN_LINES = 30
"""Lines of a failed rank's error output that are shown."""

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""


def main(args: Sequence[str] | None = None) -> int:
    """Launch what the command line says; returns the exit code."""
    options = parse_args(args)
    if options.version:
        from importlib.metadata import version

        print(version("deepspeed"))
        return 0
    try:
        node = _this_machine(options)
        variables = rank_variables(node, _threads(node), chosen_variables(options.env))
    except LaunchError as error:
        print(f"deepspeed: {error}", file=sys.stderr)
        return 2
    commands = [_command(options, rank) for rank in range(len(node.slots))]
    if options.dry_run:
        for command in commands:
            print(" ".join(command))
        return 0
    return _run(commands, variables, options.grace_period)


def _this_machine(options: argparse.Namespace) -> Node:
    unbuilt = ("include", "exclude", "hostfile", "no_ssh", "force_multi", "launcher_args", "bind_cores_to_rank")
    for name in unbuilt:
        if getattr(options, name):
            raise LaunchError(f"--{name} is not built yet: ranks run on this machine only; leave it out")
    if options.num_nodes > 1:
        raise LaunchError("--num_nodes: several nodes are not built yet; leave it out")
    accelerators = accelerator_count()
    ranks = options.num_gpus if options.num_gpus > 0 else max(1, accelerators)
    if accelerators and ranks > accelerators:
        raise LaunchError(f"--num_gpus is {ranks}, but this machine has {accelerators} accelerators; ask for at most those")
    port = options.master_port if options.master_port is not None else _free_port()
    return Node({"localhost": list(range(ranks))}, 0, options.master_addr or "127.0.0.1", port, bool(accelerators))


def _threads(node: Node) -> int:
    return len(core_shares(available_cores(), len(node.slots))[0])


def _command(options: argparse.Namespace, local_rank: int) -> list[str]:
    python = [] if options.no_python else [sys.executable, "-u", *(["-m"] if options.module else [])]
    rank = [] if options.no_local_rank or options.no_python else [f"--local_rank={local_rank}"]
    return [*python, options.user_script, *rank, *options.user_args]


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def _run(commands: list[list[str]], variables: list[dict[str, str]], grace_seconds: float) -> int:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std, start_processes

    with tempfile.TemporaryDirectory(prefix="deepspeed-") as folder:
        context = start_processes(
            name="rank",
            entrypoint=commands[0][0],
            args={rank: tuple(command[1:]) for rank, command in enumerate(commands)},
            envs=dict(enumerate(variables)),
            logs_specs=DefaultLogsSpecs(log_dir=folder, tee=Std.ERR),
            log_line_prefixes=dict.fromkeys(range(len(commands)), ""),
        )
        try:
            result = context.wait()
        except SignalException as caught:
            context.close(signal.Signals(caught.sigval), timeout=int(grace_seconds))
            return INTERRUPTED
        finally:
            context.close(signal.SIGTERM, timeout=5)
        if result is None or not result.failures:
            return 0
        rank, failure = min(result.failures.items(), key=lambda item: item[1].timestamp)
        reason = _reason(failure.exitcode)
        print(f"\ndeepspeed: rank {rank} (process {failure.pid}) failed first: {reason}", file=sys.stderr)
        lines = _last_lines(result.stderrs.get(rank))
        if lines:
            print(f"its last lines:\n{lines}", file=sys.stderr)
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode


def _reason(exit_code: int) -> str:
    if exit_code >= 0:
        return f"exit code {exit_code}"
    hint = " (the kernel does this when memory runs out)" if -exit_code == signal.SIGKILL else ""
    return f"killed by {signal.Signals(-exit_code).name}{hint}"


def _last_lines(path: str | None) -> str:
    if not path or not Path(path).exists():
        return ""
    return "\n".join(Path(path).read_text(errors="replace").splitlines()[-SHOWN_LINES:])


if __name__ == "__main__":
    sys.exit(main())
