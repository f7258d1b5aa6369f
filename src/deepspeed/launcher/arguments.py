"""The options of the ``deepspeed`` command."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

DEFAULT_HOSTFILE = "/job/hostfile"
DEFAULT_LAUNCHER = "ssh"
DEFAULT_PORT = 29500
DEFAULT_GRACE_PERIOD = 30.0
REMOTE_SHELLS = ("ssh", "pdsh")
LAUNCHERS = (*REMOTE_SHELLS, "openmpi", "mpich", "impi", "mvapich", "slurm")

_EXAMPLES = """
examples:
  deepspeed train.py --deepspeed_config ds.json               one rank per accelerator of this machine
  deepspeed --num_gpus 2 train.py                             two ranks (CPU ranks without accelerators)
  deepspeed --include localhost:1,3 train.py                  the accelerators 1 and 3
  deepspeed --hostfile hosts train.py                         all hosts of the file, over ssh
  deepspeed --hostfile hosts --launcher slurm --dry_run ...   look at the command first

Ctrl-C lets the ranks save and end; a second one ends them at once. Documentation: docs/launcher.md
"""


def _count(text: str) -> int:
    """A number of ranks or nodes; ``auto`` and -1 both leave it to the launcher."""
    if text == "auto":
        return -1
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number; expected 1 or more, or auto") from None
    if number != -1 and number < 1:
        raise argparse.ArgumentTypeError(f"{number} is too few; expected 1 or more, or auto")
    return number


def _port(text: str) -> int:
    """A TCP port; 0 leaves it to the launcher."""
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port; expected 1 to 65535, or 0 for the default")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a time; expected seconds, 0 or more")
    return seconds


def _placement(parser: argparse.ArgumentParser) -> None:
    where = parser.add_argument_group("where ranks run")
    where.add_argument(
        "--num_gpus",
        "--num_accelerators",
        type=_count,
        default=-1,
        metavar="N",
        help="ranks on each node; auto (default): every accelerator or slot, or one CPU rank without accelerators",
    )
    where.add_argument("--num_nodes", type=_count, default=-1, metavar="N", help="the first N hosts of the hostfile")
    where.add_argument("-i", "--include", default="", metavar="HOSTS", help="only these: host1@host2:0,2 (slots 0 and 2)")
    where.add_argument("-e", "--exclude", default="", metavar="HOSTS", help="all but these: host1@host2:0,2")
    where.add_argument(
        "-H",
        "--hostfile",
        default=None,
        metavar="FILE",
        help=f"lines 'hostname slots=8' (default: {DEFAULT_HOSTFILE} if there is one)",
    )
    where.add_argument("--master_addr", default="", metavar="HOST", help="address of rank 0 (default: the first host)")
    where.add_argument(
        "--master_port",
        type=_port,
        default=0,
        metavar="PORT",
        help=f"port of rank 0 (default: a free one on one machine, {DEFAULT_PORT} on several)",
    )


def _nodes(parser: argparse.ArgumentParser) -> None:
    nodes = parser.add_argument_group("several nodes")
    nodes.add_argument(
        "--launcher",
        default=None,
        type=str.lower,
        choices=LAUNCHERS,
        help=f"what starts the ranks, on one machine too where it is named (default for several: {DEFAULT_LAUNCHER})",
    )
    nodes.add_argument("--launcher_args", default="", metavar="ARGS", help="more arguments for that launcher, as one string")
    nodes.add_argument("--force_multi", action="store_true", help="use the launcher even for this machine alone")
    nodes.add_argument("--ssh_port", type=_port, default=0, metavar="PORT", help="port of the hosts' ssh servers")
    nodes.add_argument("--no_ssh_check", action="store_true", help="do not first try to reach every host by ssh")
    nodes.add_argument("--no_ssh", action="store_true", help="start this node only: run the same command on every node")
    nodes.add_argument("--node_rank", type=int, default=-1, metavar="R", help="with --no_ssh: this node's place, from 0")


def add_program_arguments(parser: argparse.ArgumentParser) -> None:
    """What runs on each rank and how, for the ``deepspeed`` command and for the entries it starts on other nodes."""
    program = parser.add_argument_group("what runs")
    program.add_argument("--module", action="store_true", help="SCRIPT is a module, as in python -m")
    program.add_argument("--no_python", action="store_true", help="SCRIPT is a program of its own")
    program.add_argument("--no_local_rank", action="store_true", help="do not pass --local_rank=N to the script")
    program.add_argument("--bind_cores_to_rank", action="store_true", help="pin each rank to its own share of the cores")
    program.add_argument(
        "--bind_core_list", default="", metavar="CORES", help="pin ranks to shares of these cores: 0-15,32 (implies the above)"
    )
    program.add_argument(
        "--enable_each_rank_log", default="", metavar="DIR", help="write each rank's output to DIR/rank_N.log instead"
    )
    program.add_argument(
        "--grace_period",
        type=_seconds,
        default=DEFAULT_GRACE_PERIOD,
        metavar="SECONDS",
        help="time that ranks get to save after Ctrl-C or SIGTERM (default: %(default)s)",
    )
    parser.add_argument("user_script", metavar="SCRIPT", nargs="?", help="script, module or program")
    parser.add_argument("user_args", metavar="ARGS", nargs=argparse.REMAINDER, help="its arguments")


class _Unbuilt(argparse.Action):
    """An option of the documented command whose feature is not built: refused, never ignored."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: object, option: str | None = None
    ) -> None:
        parser.error(f"{option} is not built yet; leave it out")


class _Parser(argparse.ArgumentParser):
    """Says how to give an option a value that begins with a dash, such as another program's option."""

    def error(self, message: str) -> NoReturn:
        match = re.match(r"argument (\S*?)(--\w+): expected one argument", message)
        super().error(f"{message}; write {match[2]}=VALUE where the value begins with a dash" if match else message)


def build_parser() -> argparse.ArgumentParser:
    """The parser of the ``deepspeed`` command, for parsing and for help."""
    parser = _Parser(
        prog="deepspeed",
        usage="deepspeed [options] SCRIPT [arguments of the script]",
        description="Run a training script as one process per accelerator, or per CPU rank, on one or many nodes.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="store_true", help="print the version and stop")
    _placement(parser)
    _nodes(parser)
    start = parser.add_argument_group("starting")
    start.add_argument(
        "--env", action="append", default=[], metavar="KEY=VALUE", help="set a variable on every node (repeatable)"
    )
    start.add_argument("--save_pid", action="store_true", help="write the launcher's process id to /tmp/PID.ds")
    start.add_argument("--dry_run", action="store_true", help="print the commands and stop")
    for option, arguments in (
        ("--elastic_training", 0),
        ("--min_elastic_nodes", 1),
        ("--max_elastic_nodes", 1),
        ("--autotuning", 1),
        ("--venv_script", 1),
    ):
        start.add_argument(option, action=_Unbuilt, nargs=arguments, help=argparse.SUPPRESS)
    add_program_arguments(parser)
    return parser


def parse_args(args: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse a command line (``sys.argv`` when none is given); exits with code 2 and one line where it is wrong."""
    parser = build_parser()
    options = parser.parse_args(args)
    if options.version:
        return options
    if not options.user_script:
        parser.error("no script given; expected: deepspeed [options] SCRIPT [arguments of the script]")
    for wrong in (_contradictions(options), _without_effect(options)):
        if wrong:
            parser.error(wrong)
    return options


def _contradictions(options: argparse.Namespace) -> str:
    """What is wrong with the options taken together; empty where nothing is."""
    if options.include and options.exclude:
        return "--include and --exclude contradict each other; give one of them"
    if options.module and options.no_python:
        return "--module runs a Python module and --no_python a program; give one of them"
    if (options.include or options.exclude) and (options.num_gpus != -1 or options.num_nodes != -1):
        return "--include and --exclude choose the ranks; leave out --num_gpus and --num_nodes"
    if options.no_ssh and (options.launcher or options.force_multi):
        return "--no_ssh starts this node only and --launcher or --force_multi the others; give one of them"
    if options.hostfile is not None and not Path(options.hostfile).is_file():
        return f"--hostfile: there is no file {options.hostfile}; check the path, from {Path.cwd()}"
    return ""


def _without_effect(options: argparse.Namespace) -> str:
    """An option that would have no effect beside the others; empty where there is none."""
    if options.no_ssh != (options.node_rank >= 0):
        return "--no_ssh and --node_rank R go together: R is this node's place among the nodes, from 0"
    launcher = options.launcher or DEFAULT_LAUNCHER
    if options.ssh_port and (launcher not in REMOTE_SHELLS or options.no_ssh):
        return f"--ssh_port is for --launcher {' or '.join(REMOTE_SHELLS)}; leave it out"
    if options.launcher_args and options.no_ssh:
        return "--launcher_args are for a launcher of other nodes, and --no_ssh uses none; leave them out"
    return ""
