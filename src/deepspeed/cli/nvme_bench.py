"""``deepspeed nvme-bench``: find the section ``aio`` that reads and writes a disk fastest."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ..config import ConfigError, load_config
from ..memory.files import aio_section, queue_options
from ..native.file_engine import Backend, QueueOptions, status
from ..native.files import File, FileQueue, aligned_empty

STREAM_BLOCK = 16 << 20
"""Bytes that the plain stream asks for at a time: enough for the kernel to keep the device busy with one caller."""

WIDTH = 110
"""Columns where the output is no terminal."""


@dataclass
class Rates:
    """Bytes per second of each round."""

    read: list[float] = field(default_factory=list)
    write: list[float] = field(default_factory=list)

    @property
    def medians(self) -> tuple[float, float]:
        """Of reads and of writes, in GB/s."""
        return statistics.median(self.read) / 1e9, statistics.median(self.write) / 1e9

    @property
    def both(self) -> float:
        """GB/s of reading and then writing each byte, as an optimizer step does."""
        read, write = self.medians
        return 2 / (1 / read + 1 / write)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command on ``argv`` (the arguments after ``nvme-bench``); returns its exit code, 2 for bad input."""
    options = _parser().parse_args(argv)
    try:
        candidates = _candidates(options)
        if not options.folder.is_dir():
            raise ValueError(f"{options.folder} is no directory; name one on the device that is to be measured")
        memory = aligned_empty(options.size, torch.uint8)
        memory.random_(generator=torch.Generator().manual_seed(0))  # a device that compresses gains nothing
        with tempfile.NamedTemporaryFile(dir=options.folder, prefix="nvme-bench-") as file:
            rates, direct = measure(file.name, memory, candidates, rounds=options.rounds, backend=options.backend)
    except (ConfigError, OSError, ValueError) as error:
        print(f"deepspeed nvme-bench: error: {error}", file=sys.stderr)
        return 2
    best = max((candidate for candidate in rates if candidate is not None), key=lambda candidate: rates[candidate].both)
    console = Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)
    console.print(_table(rates, best, options, direct=direct))
    section = json.dumps({"aio": aio_section(best)}, indent=2)
    if options.output is None:
        print(section)
    else:
        options.output.write_text(section + "\n")
        print(f"the best section aio is in {options.output}")
    return 0


def measure(
    path: str, memory: Tensor, candidates: Sequence[QueueOptions], *, rounds: int, backend: Backend | None = None
) -> tuple[dict[QueueOptions | None, Rates], bool]:
    """The rates of each candidate with a file as large as ``memory``, and of the plain stream (key None); and whether the
    page cache was bypassed. All take turns, so that a device that slows down slows all of them."""
    rates: dict[QueueOptions | None, Rates] = {candidate: Rates() for candidate in (None, *candidates)}
    with FileQueue(backend=backend) as queue, queue.open(path, nbytes=memory.nbytes) as file:
        direct = file.direct
        # Blocks that were never written are slower to write, once.
        file.submit_write(memory).wait()
    for number in range(rounds):
        # In another order each time: a device that is slow after much work would always slow the same ones.
        for candidate, found in random.Random(number).sample([*rates.items()], len(rates)):
            if candidate is None:
                found.write.append(_rate(stream, path, memory, writing=True, direct=direct))
                found.read.append(_rate(stream, path, memory, writing=False, direct=direct))
                continue
            with FileQueue(candidate, backend=backend) as queue, queue.open(path) as file:
                found.write.append(_rate(transfer, file, memory, writing=True))
                found.read.append(_rate(transfer, file, memory, writing=False))
    return rates, direct


def _rate(move: Callable[..., None], target: File | str, memory: Tensor, **how: bool) -> float:
    """Bytes per second of ``move``."""
    begin = time.perf_counter()
    move(target, memory, **how)
    return memory.nbytes / (time.perf_counter() - begin)


def transfer(file: File, memory: Tensor, *, writing: bool) -> None:
    """Move the whole file by one transfer, which the queue cuts into blocks."""
    moving = file.submit_write(memory) if writing else file.submit_read(memory)
    moving.wait()


def stream(path: str, memory: Tensor, *, writing: bool, direct: bool, block_size: int = STREAM_BLOCK) -> None:
    """Move the whole file by one sequential stream of requests, one after another, as ``dd`` does."""
    descriptor = os.open(path, (os.O_WRONLY if writing else os.O_RDONLY) | (os.O_DIRECT if direct else 0))
    try:
        view = memory.numpy().data
        for offset in range(0, len(view), block_size):
            part = view[offset : offset + block_size]
            moved = os.pwrite(descriptor, part, offset) if writing else os.preadv(descriptor, [part], offset)
            if moved != len(part):
                raise OSError(f"the plain stream moved {moved} of {len(part)} bytes at offset {offset} of {path}")
    finally:
        os.close(descriptor)


def _candidates(options: argparse.Namespace) -> list[QueueOptions]:
    """All combinations, and what the given configuration has."""
    combinations: Iterator[tuple[int, int, int]] = itertools.product(
        options.block_sizes, options.queue_depths, options.thread_counts
    )
    found = [QueueOptions(block_size, depth, threads) for block_size, depth, threads in combinations]
    if options.config is not None:
        found.insert(0, queue_options(load_config(options.config, world_size=1).aio))
    return list(dict.fromkeys(found))


def _table(rates: dict[QueueOptions | None, Rates], best: QueueOptions, options: argparse.Namespace, *, direct: bool) -> Table:
    how = "past the page cache" if direct else "by the page cache, for this file system has no O_DIRECT"
    title = f"{options.folder}, {options.size / 1e9:.2f} GB, {how}, {options.backend or status()}; GB/s"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for name in ("block_size", "queue_depth", "thread_count", "read", "of stream", "write", "of stream"):
        table.add_column(name, justify="right")
    limits = rates[None].medians
    for candidate, found in rates.items():
        pairs = zip(found.medians, limits, strict=True)
        figures = [figure for rate, limit in pairs for figure in (f"{rate:.2f}", f"{rate / limit:.2f}")]
        if candidate is None:
            table.add_row("plain stream", str(STREAM_BLOCK), "1", "1", *figures)
        else:
            keys = (candidate.block_size, candidate.queue_depth, candidate.thread_count)
            table.add_row("best" if candidate == best else "", *map(str, keys), *figures)
    return table


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="deepspeed nvme-bench",
        description="Read and write a temporary file in DIR with different settings, beside a plain sequential stream, and "
        'print the best section "aio" of a configuration.',
    )
    parser.add_argument("folder", metavar="DIR", type=Path, help="a directory on the device, such as nvme_path")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the section there instead of printing it")
    parser.add_argument("--config", metavar="FILE", help="a ds_config.json whose section aio is measured too")
    parser.add_argument("--size", type=_nbytes, default=1 << 30, metavar="BYTES", help="of file and memory (default: 1G)")
    parser.add_argument("--rounds", type=_count, default=3, metavar="N", help="of which medians are shown (default: 3)")
    block_sizes = [256 << 10, 1 << 20, 4 << 20]
    parser.add_argument("--block-sizes", type=_list_of(_nbytes), default=block_sizes, metavar="BYTES,...")
    parser.add_argument("--queue-depths", type=_list_of(_count), default=[2, 8, 32], metavar="N,...")
    parser.add_argument("--thread-counts", type=_list_of(_count), default=[1], metavar="N,...")
    parser.add_argument("--backend", choices=get_args(Backend), help="default: the best that works here")
    return parser


def _count(text: str) -> int:
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"found {text}, expected a whole number of at least 1")
    return number


def _nbytes(text: str) -> int:
    """A number of bytes, as 4096, 256K, 1M or 2G."""
    unit = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:].upper(), 1)
    return _count(text if unit == 1 else text[:-1]) * unit


def _list_of(item: Callable[[str], int]) -> Callable[[str], list[int]]:
    return lambda text: [item(part) for part in text.split(",")]
