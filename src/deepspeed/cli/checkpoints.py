"""``deepspeed convert`` and ``deepspeed inspect``: checkpoints without training."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from ..checkpoint.conversion import convert
from ..checkpoint.directory import CheckpointError
from ..checkpoint.foreign.writing import write_original
from ..checkpoint.inspection import difference, summary
from ..checkpoint.opening import open_source, resolve

WIDTH = 150
"""Columns where the output is no terminal."""


def convert_main(argv: Sequence[str] | None = None) -> int:
    """Run ``deepspeed convert`` on ``argv``, the arguments after it; returns its exit code, 2 for bad input."""
    parser = argparse.ArgumentParser(
        prog="deepspeed convert", description="Write a checkpoint of another program as one of this package, or the other way."
    )
    _add_source(parser)
    parser.add_argument("destination", metavar="DST", type=Path, help="the directory for the checkpoint and 'latest'")
    parser.add_argument(
        "--to",
        choices=("fragments", "deepspeed"),
        default="fragments",
        help="the format: this package's own, or the original DeepSpeed's files (default: %(default)s)",
    )
    options = parser.parse_args(argv)

    def run() -> int:
        path = resolve(options.source, options.tag)
        with open_source(path) as source:
            write = convert if options.to == "fragments" else write_original
            print(f"{path} is written as {write(source, options.destination, options.tag or path.name)}")
        return 0

    return _reported("convert", run)


def inspect_main(argv: Sequence[str] | None = None) -> int:
    """Run ``deepspeed inspect`` on ``argv``; returns its exit code: 0, 1 where two checkpoints differ, 2 for bad input and for
    a checkpoint that is damaged."""
    parser = argparse.ArgumentParser(
        prog="deepspeed inspect", description="Say what a checkpoint is and holds, and whether it is whole and undamaged."
    )
    _add_source(parser)
    parser.add_argument("--diff", metavar="OTHER", type=Path, help="compare with the checkpoint in OTHER, value by value")
    options = parser.parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else WIDTH)

    def run() -> int:
        path = resolve(options.source, options.tag)
        with open_source(path) as source:
            if options.diff is None:
                console.print(*summary(source), sep="\n", highlight=False)
                return 0
            with open_source(resolve(options.diff)) as other:
                differences = difference(source, other)
                console.print(*(differences or ["no difference"]), sep="\n", highlight=False)
                return 1 if differences else 0

    return _reported("inspect", run)


def _add_source(parser: argparse.ArgumentParser) -> None:
    text = "a directory with the file 'latest', or that of one checkpoint"
    parser.add_argument("source", metavar="DIR", type=Path, help=text)
    parser.add_argument("-t", "--tag", help="the checkpoint in DIR (default: what 'latest' names)")


def _reported(command: str, run: Callable[[], int]) -> int:
    try:
        return run()
    except (CheckpointError, OSError, TypeError, ValueError) as error:
        print(f"deepspeed {command}: error: {error}", file=sys.stderr)
        return 2
