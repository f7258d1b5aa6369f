"""Speed of file I/O: a file queue on each of its backends, and plain sequential streams as ``dd`` makes them.

::

    python benchmarks/files.py DIR --size 512 --rounds 5

All read and write the same file in DIR, past the page cache where its file system has O_DIRECT. They take turns in changing
order, so that a device that slows down slows all of them; what was read is compared with what was written. Processor time is
that of all threads of this process, with the kernel's work for them.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepspeed.cli.nvme_bench import stream, transfer
from deepspeed.native.file_engine import QueueOptions, backends
from deepspeed.native.files import FileQueue, aligned_empty

MEBIBYTE = 1 << 20


@dataclass
class Candidate:
    """A way to read into ``memory`` and to write from it, and what each round took: seconds, and seconds of processors."""

    memory: Tensor
    move: Callable[..., None]
    seconds: dict[str, list[float]] = field(default_factory=lambda: {"read": [], "write": []})
    processor_seconds: dict[str, list[float]] = field(default_factory=lambda: {"read": [], "write": []})

    def run(self, direction: str) -> None:
        """Move the file once."""
        wall, processor = time.perf_counter(), time.process_time()
        self.move(self.memory, writing=direction == "write")
        self.seconds[direction].append(time.perf_counter() - wall)
        self.processor_seconds[direction].append(time.process_time() - processor)


def by_stream(path: str, block_size: int, direct: bool, memory: Tensor, *, writing: bool) -> None:
    """One request after another."""
    stream(path, memory, writing=writing, direct=direct, block_size=block_size)


def make_candidates(path: str, nbytes: int, options: QueueOptions, stack: ExitStack) -> dict[str, Candidate]:
    """All candidates; their files are closed with ``stack``."""
    aligned = aligned_empty(nbytes, torch.uint8)
    shifted = aligned_empty(nbytes + 64, torch.uint8)[64:]  # as torch's allocator aligns large tensors
    found: dict[str, Candidate] = {}
    for name, text in backends().items():
        if text.startswith("not "):
            continue
        queue = stack.enter_context(FileQueue(options, backend=name))
        file = stack.enter_context(queue.open(path, nbytes=nbytes))
        if not found:
            for block_size in (1, 16):
                plain = partial(by_stream, path, block_size * MEBIBYTE, file.direct)
                found[f"stream, {block_size} MiB"] = Candidate(aligned, plain)
        found[name] = Candidate(aligned, partial(transfer, file))
        if name == "io_uring":
            own = aligned_empty(nbytes, torch.uint8)
            if queue.register(own):
                found[f"{name}, registered"] = Candidate(own, partial(transfer, file))
        found[f"{name}, unaligned"] = Candidate(shifted, partial(transfer, file))
    return found


def measure(path: str, nbytes: int, options: QueueOptions, rounds: int) -> list[dict[str, Any]]:
    """Rows of medians. AssertionError where a candidate read something else than was written."""
    pattern = torch.empty(nbytes, dtype=torch.uint8).random_(generator=torch.Generator().manual_seed(0))
    with ExitStack() as stack:
        candidates = make_candidates(path, nbytes, options, stack)
        for number in range(rounds + 1):  # the first is warm-up: blocks that were never written are slower to write
            # In another order each time: a device that is slow after much work would always slow the same ones.
            for name, candidate in random.Random(number).sample([*candidates.items()], len(candidates)):
                candidate.memory.copy_(pattern)
                candidate.run("write")
                candidate.memory.zero_()
                candidate.run("read")
                assert torch.equal(candidate.memory, pattern), f"{name} read something else than it wrote"
                if number == 0:
                    for values in (*candidate.seconds.values(), *candidate.processor_seconds.values()):
                        values.clear()
    return [
        row(name, direction, candidate, candidates["stream, 1 MiB"], nbytes)
        for direction in ("read", "write")
        for name, candidate in candidates.items()
    ]


def row(name: str, direction: str, candidate: Candidate, plain: Candidate, nbytes: int) -> dict[str, Any]:
    """The figures of one candidate in one direction."""
    seconds = statistics.median(candidate.seconds[direction])
    return {
        "direction": direction,
        "candidate": name,
        "gigabytes_per_second": nbytes / seconds / 1e9,
        "times_stream": statistics.median(plain.seconds[direction]) / seconds,
        "processor_seconds_per_gigabyte": statistics.median(candidate.processor_seconds[direction]) / nbytes * 1e9,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="DIR", type=Path, help="a directory on the device")
    parser.add_argument("--size", type=int, default=512, help="of the file, in MiB (default 512)")
    parser.add_argument("--rounds", type=int, default=5, help="timed runs of each candidate (default 5)")
    parser.add_argument("--block_size", type=int, default=MEBIBYTE, help="of a request, in bytes (default 1048576)")
    parser.add_argument("--queue_depth", type=int, default=16, help="requests in flight (default 16)")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    options = QueueOptions(arguments.block_size, arguments.queue_depth)
    print(f"{arguments.size} MiB, blocks of {options.block_size} bytes, {options.queue_depth} requests in flight")
    print(f"{'':6} {'':20} {'GB/s':>6} {'x stream':>8} {'cpu s/GB':>8}")
    with tempfile.NamedTemporaryFile(dir=arguments.folder) as file:
        rows = measure(file.name, arguments.size * MEBIBYTE, options, arguments.rounds)
    for figures in rows:
        direction, name, rate, times, processor = figures.values()
        print(f"{direction:6} {name:20} {rate:6.2f} {times:8.2f} {processor:8.3f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
