"""Time of collectives among ranks of this machine: through memory, by gloo, and memory's own for the same bytes.

::

    python benchmarks/comm.py --ranks 2 --sizes 4 64 1024 65536 --json comm.json

Sizes are in KB of the whole buffer. ``memory`` and ``sockets`` are the project's communicator with the host transport and
without, ``gloo`` is torch.distributed's operation of that name. ``copy`` is what the ranks, all at once, take to copy as
many bytes as each must receive: (n - 1) / n of the buffer, twice that for an all-reduce, all of it for a broadcast. The
candidates take turns, and a time is that of the slowest rank.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ranks import run_ranks

LARGEST_WORK = 256 << 20
"""Bytes that all repetitions of a case work on."""


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--sizes", type=int, nargs="+", default=[4, 64, 1024, 16384, 65536, 262144], help="KB")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    return parser.parse_args()


def candidates(communicators: dict[str, Any], buffer: Any, spare: Any) -> dict[str, dict[str, Callable[[], object]]]:
    """By operation and candidate, what to run."""
    import torch.distributed as dist

    size, rank = dist.get_world_size(), dist.get_rank()
    own, received = buffer.chunk(size)[rank], buffer.numel() * (size - 1) // size
    operations: dict[str, dict[str, Callable[[], object]]] = {}
    plain: dict[str, Callable[[], object]] = {
        "all_reduce": lambda: dist.all_reduce(buffer),
        "reduce_scatter": lambda: dist.reduce_scatter_tensor(own, buffer),
        "all_gather": lambda: dist.all_gather_into_tensor(buffer, own),
        "broadcast": lambda: dist.broadcast(buffer, 0),
        "all_to_all": lambda: dist.all_to_all_single(spare, buffer),
    }
    copied = {"all_reduce": 2 * received, "broadcast": buffer.numel()}
    for kind, torch_own in plain.items():
        whole: dict[str, Callable[[], object]] = {}
        for name, communicator in communicators.items():
            arguments = (buffer, spare) if kind == "all_to_all" else (buffer,)
            whole[name] = lambda c=communicator, kind=kind, a=arguments: getattr(c, kind)(*a).wait()
        numel = copied.get(kind, received)

        def copy(numel: int = numel) -> None:
            for begin in range(0, numel, buffer.numel()):
                part = min(buffer.numel(), numel - begin)
                spare[:part].copy_(buffer[:part])

        operations[kind] = {**whole, "gloo": torch_own, "copy": copy}
    return operations


def measure(sizes: list[int]) -> list[dict[str, Any]]:
    """One rank's part."""
    import torch
    import torch.distributed as dist

    from deepspeed.comm.communicator import Communicator

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    through = Communicator()
    os.environ["DEEPSPEED_HOST_TRANSPORT"] = "0"
    communicators = {"memory": through, "sockets": Communicator(dist.new_group())}
    rows = []
    for kilobytes in sizes:
        nbytes = kilobytes << 10
        buffer, spare = torch.zeros(nbytes // 4), torch.ones(nbytes // 4)
        repetitions = max(3, min(200, LARGEST_WORK // nbytes))
        for kind, variants in candidates(communicators, buffer, spare).items():
            seconds: dict[str, list[float]] = {name: [] for name in variants}
            for _ in range(repetitions):
                for name, run in variants.items():
                    through.barrier()
                    start = time.perf_counter()
                    run()
                    seconds[name].append(time.perf_counter() - start)
            medians = torch.tensor([statistics.median(times) for times in seconds.values()], dtype=torch.float64)
            dist.all_reduce(medians, dist.ReduceOp.MAX)
            rows.append({"operation": kind, "nbytes": nbytes, **dict(zip(variants, medians.tolist(), strict=True))})
    return rows


def print_table(rows: list[dict[str, Any]]) -> None:
    """Times in microseconds, and how much of the copy's speed the way through memory has."""
    print(f"{'operation':16}{'KB':>8}{'memory':>11}{'sockets':>11}{'gloo':>11}{'copy':>11}{'x gloo':>8}{'of copy':>9}")
    for row in rows:
        times = "".join(f"{1e6 * row[name]:11.0f}" for name in ("memory", "sockets", "gloo", "copy"))
        print(
            f"{row['operation']:16}{row['nbytes'] >> 10:8}{times}"
            f"{row['memory'] / row['gloo']:8.2f}{row['copy'] / row['memory']:9.0%}"
        )


def main() -> None:
    """Be a rank where RANK is set; otherwise start ranks, and print what they measured."""
    options = parse_arguments()
    if "RANK" in os.environ:
        rows = measure(options.sizes)
        if os.environ["RANK"] == "0":
            options.json.write_text(json.dumps(rows, indent=2))
        # Threads of the gloo backend that still run while the interpreter is torn down can abort a finished process.
        os._exit(0)
    with tempfile.TemporaryDirectory() as folder:
        report = options.json or Path(folder) / "figures.json"
        command = [sys.executable, str(Path(__file__).resolve()), "--json", str(report), "--sizes"]
        run_ranks([*command, *map(str, options.sizes)], options.ranks, name="comm")
        print_table(json.loads(report.read_text()))


if __name__ == "__main__":
    main()
