"""``deepspeed config``: look at a configuration without training."""

from __future__ import annotations

import argparse
import inspect
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..config import ConfigError, DeepSpeedConfig, load_config
from ..config.effective import Entry, effective_entries
from ..config.origin import DEFAULT, Kind
from ..config.reference import reference
from ..config.schema import json_schema

WIDTH = 150
"""Columns where the output is no terminal."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command on ``argv`` (the arguments after ``config``); returns its exit code, 2 for bad input."""
    options = _parser().parse_args(argv)
    try:
        return int(options.run(options))
    except ConfigError as error:
        print(f"deepspeed config: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # The reader has seen enough; without this Python would complain once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="deepspeed config", description="Look at a configuration without training.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    explain = commands.add_parser("explain", help="print every effective value and where it came from")
    explain.add_argument("file", metavar="FILE", help="a ds_config.json: its path, its text, or base64 of that")
    explain.add_argument("--world_size", type=_ranks, default=1, metavar="N", help="data-parallel ranks (default: 1)")
    explain.add_argument("--all", action="store_true", help="also keys that have no effect")
    explain.set_defaults(run=_explain)
    schema = commands.add_parser("schema", help="print the JSON Schema of configurations, for editors")
    schema.set_defaults(run=lambda options: _print(json.dumps(json_schema(), indent=2)))
    page = commands.add_parser("reference", help="print the reference page of all keys, in Markdown")
    page.set_defaults(run=lambda options: _print(reference().rstrip("\n")))
    return parser


def _ranks(text: str) -> int:
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"found {text}, expected a whole number of at least 1")
    return number


def _print(text: str) -> int:
    print(text)
    return 0


def _explain(options: argparse.Namespace) -> int:
    config = load_config(options.file, world_size=options.world_size)
    source = Path(options.file).name if Path(options.file).exists() else "given"
    entries = [*_with_arguments(config)]
    shown = [entry for entry in entries if options.all or not entry.idle or entry.origin != DEFAULT]
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    ranks = "1 data-parallel rank" if options.world_size == 1 else f"{options.world_size} data-parallel ranks"
    console.print(_table(shown, title=f"{source}, {ranks}", source=source))
    hidden = len(entries) - len(shown)
    if hidden:
        console.print(
            f"{hidden} more keys have no effect here: their section is off, or another stage reads them. See them with --all."
        )
    return 0


def _table(entries: Iterable[Entry], *, title: str, source: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    table.add_column("key", overflow="fold")
    table.add_column("value", overflow="fold")
    table.add_column("from", overflow="fold")
    previous = ""
    for entry in entries:
        section, _, name = entry.path.rpartition(".")
        if section != previous and section:
            table.add_row(Text(section, style="bold"), "", "")
        previous = section
        origin = source if entry.origin.kind is Kind.GIVEN else str(entry.origin)
        if entry.idle:
            origin += f", no effect: {entry.idle}"
        # Bold is what somebody chose; dim is what nobody did.
        style = "dim" if entry.origin == DEFAULT or entry.idle else "bold"
        # Only counted things have a unit worth reading here: "2000 elements", but no "1.0 factor".
        value = f"{json.dumps(entry.value, default=str)} {entry.unit if isinstance(entry.value, int) else ''}"
        table.add_row(Text("  " + name if section else name, style), Text(value.rstrip(), style), Text(origin, style))
    return table


def _with_arguments(config: DeepSpeedConfig) -> Iterator[Entry]:
    """The entries of ``config``, with the arguments of its optimizer and schedule, defaults too.

    Raises ConfigError where one of them is unknown or missing.
    """
    from ..optim.factory import OPTIMIZERS
    from ..optim.schedules import SCHEDULES

    known: dict[str, tuple[Mapping[str, Callable[..., Any]], str]] = {
        "optimizer": (OPTIMIZERS, "params"),
        "scheduler": (SCHEDULES, "optimizer"),
    }
    for entry in effective_entries(config):
        section, inside, _ = entry.path.partition(".params")
        if not inside or getattr(config, section).type is None:
            yield entry
        elif section in known:
            kinds, given = known.pop(section)
            yield from _arguments(config, section, kinds, given=given)


def _arguments(
    config: DeepSpeedConfig, section: str, known: Mapping[str, Callable[..., Any]], *, given: str
) -> Iterator[Entry]:
    """The arguments of what ``section`` names, one of ``known``, but for the one that is ``given`` by the caller."""
    from ..optim.arguments import checked_arguments, closest

    kind, params = getattr(config, section).type, getattr(config, section).params
    name = next((name for name in known if name.lower() == kind.lower()), None)
    if name is None:
        raise ConfigError(f"{section}.type '{kind}' is unknown.{closest(kind, known)} Available: {', '.join(known)}")
    try:
        arguments = checked_arguments(section, name, known[name], params, given=(given,))
    except ValueError as error:
        raise ConfigError(str(error)) from None
    for argument, parameter in inspect.signature(known[name]).parameters.items():
        if argument != given:
            path = f"{section}.params.{argument}"
            yield Entry(path, arguments.get(argument, parameter.default), "", config.origin(path))
