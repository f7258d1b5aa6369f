"""The options of the ``deepspeed`` command."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

DEFAULT_HOSTFILE = "/job/hostfile"
DEFAULT_GRACE_PERIOD = 30.0
LAUNCHERS = ("pdsh", "ssh", "openmpi", "mpich", "mvapich", "slurm")


def _placement(parser: argparse.ArgumentParser) -> None:
    where = parser.add_argument_group("where ranks run")
    where.add_argument("--num_gpus", type=int, default=-1, metavar="N", help="ranks on each node (CPU ranks without GPU)")
    where.add_argument("--num_nodes", type=int, default=-1, metavar="N", help="use the first N hosts of the hostfile")
    where.add_argument("-i", "--include", default="", metavar="HOSTS", help="only these, as host1@host2:0,2")
    where.add_argument("-e", "--exclude", default="", metavar="HOSTS", help="all but these, as host1@host2:0,2")
    where.add_argument(
        "-H", "--hostfile", default=None, metavar="FILE", help=f"lines 'hostname slots=8' (default: {DEFAULT_HOSTFILE})"
    )
    where.add_argument("--master_addr", default="", metavar="HOST", help="address of rank 0 (default: the first host)")
    where.add_argument("--master_port", type=int, default=None, metavar="PORT", help="default: free port, or 29500")
    where.add_argument("--bind_cores_to_rank", action="store_true", help="pin each rank to its own share of the cores")


def _nodes(parser: argparse.ArgumentParser) -> None:
    nodes = parser.add_argument_group("several nodes")
    nodes.add_argument("--launcher", default="pdsh", type=str.lower, choices=LAUNCHERS, help="how nodes are reached")
    nodes.add_argument("--launcher_args", default="", metavar="ARGS", help="more arguments for that launcher")
    nodes.add_argument("--force_multi", action="store_true", help="use the launcher even for this machine alone")
    nodes.add_argument("--no_ssh", action="store_true", help="run the same command on each node, with --node_rank")
    nodes.add_argument("--node_rank", type=int, default=-1, metavar="R", help="this node's place in the hostfile")
    nodes.add_argument("--world_info", default="", help=argparse.SUPPRESS)


def _program(parser: argparse.ArgumentParser) -> None:
    program = parser.add_argument_group("what runs")
    program.add_argument("--module", action="store_true", help="SCRIPT is a module, as in python -m")
    program.add_argument("--no_python", action="store_true", help="SCRIPT is a program of its own")
    program.add_argument("--no_local_rank", action="store_true", help="do not pass --local_rank=N to the script")
    program.add_argument(
        "--env", action="append", default=[], metavar="KEY=VALUE", help="set a variable on every node (repeatable)"
    )
    program.add_argument(
        "--grace_period",
        type=float,
        default=DEFAULT_GRACE_PERIOD,
        metavar="SECONDS",
        help="time that ranks get to save after Ctrl-C or SIGTERM (default: %(default)s)",
    )
    program.add_argument("--dry_run", action="store_true", help="print the commands and stop")


def build_parser() -> argparse.ArgumentParser:
    """The parser of the ``deepspeed`` command, for parsing and for help."""
    parser = argparse.ArgumentParser(
        prog="deepspeed",
        description="Run a training script as one process per accelerator, or per CPU rank, on one or many nodes.",
    )
    parser.add_argument("--version", action="store_true", help="print the version and stop")
    _placement(parser)
    _nodes(parser)
    _program(parser)
    parser.add_argument("user_script", metavar="SCRIPT", nargs="?", help="script, module or program")
    parser.add_argument("user_args", metavar="ARGS", nargs=argparse.REMAINDER, help="its arguments")
    return parser


def parse_args(args: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse a command line (``sys.argv`` when none is given); exits with code 2 and one line where it is wrong."""
    parser = build_parser()
    options = parser.parse_args(args)
    if options.version:
        return options
    if not options.user_script:
        parser.error("no script given; expected: deepspeed [options] SCRIPT [arguments of the script]")
    if options.include and options.exclude:
        parser.error("--include and --exclude contradict each other; give one of them")
    if options.module and options.no_python:
        parser.error("--module runs a Python module and --no_python a program; give one of them")
    if (options.include or options.exclude) and (options.num_gpus != -1 or options.num_nodes != -1):
        parser.error("--include and --exclude choose the ranks; leave out --num_gpus and --num_nodes")
    for name, value in (("--num_gpus", options.num_gpus), ("--num_nodes", options.num_nodes)):
        if value != -1 and value < 1:
            parser.error(f"{name} is {value}; expected 1 or more")
    if options.no_ssh and options.node_rank < 0:
        parser.error("--no_ssh needs --node_rank R: this node's place in the hostfile, from 0")
    if options.master_port is not None and not 0 < options.master_port < 65536:
        parser.error(f"--master_port is {options.master_port}; expected a port from 1 to 65535")
    if options.grace_period < 0:
        parser.error(f"--grace_period is {options.grace_period}; expected seconds, 0 or more")
    return options
