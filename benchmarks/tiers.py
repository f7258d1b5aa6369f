"""The step of an optimizer whose states are on a disk, beside the time in which the disk alone moves as many bytes.

::

    python benchmarks/tiers.py DIR --stage 2
    python benchmarks/tiers.py DIR --stage 3 --parameters --compare other=/other/environment/bin/python

Every candidate trains the same GPT (`gpt.py`) in a process of its own, one micro-batch a step. Before and after each step this
script moves a file in DIR with the same block size and depth: what the disk gave then is the step's limit, so that a disk that
slows down slows both. Bytes are those that the kernel counted for the process.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

WARM_UP = 2
"""Steps that are not counted: the first makes the states, and blocks that were never written are slower to write."""

SECTOR = 512
"""Bytes of a sector in /sys/block/*/stat, whatever the device's are."""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="DIR", type=Path, help="a directory on the device")
    parser.add_argument("--stage", type=int, default=2, help="ZeRO stage (default 2)")
    parser.add_argument("--parameters", action="store_true", help="have parameters on the disk too, at stage 3")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--optimizer", choices=["AdamW", "SGD"], default="AdamW")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each candidate (default 5)")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=640)
    parser.add_argument("--vocabulary", type=int, default=16384)
    parser.add_argument("--buffer_size", type=int, default=30_000_000, help="of fp32 elements; there are 4 (default 30000000)")
    parser.add_argument("--sub_group_size", type=int, default=10**9, help="parameters of a chunk at most (default 1000000000)")
    parser.add_argument("--block_size", type=int, default=1 << 20, help="bytes of a request (default 1048576)")
    parser.add_argument("--queue_depth", type=int, default=16, help="requests in flight (default 16)")
    parser.add_argument("--limit_size", type=int, default=512, help="MiB of the file that shows the limit (default 512)")
    parser.add_argument("--compare", action="append", default=[], metavar="NAME=PYTHON", help="another interpreter's deepspeed")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def configuration(options: argparse.Namespace) -> dict[str, Any]:
    """With keys that every deepspeed knows."""
    disk = {"device": "nvme", "nvme_path": str(options.folder)}
    zero: dict[str, Any] = {
        "stage": options.stage,
        "sub_group_size": options.sub_group_size,
        "stage3_param_persistence_threshold": 0,
        "offload_optimizer": {
            **disk,
            "buffer_count": 4,
            "buffer_size": options.buffer_size,
            "pipeline_read": True,
            "pipeline_write": True,
        },
    }
    if options.parameters:
        zero["offload_param"] = {**disk, "max_in_cpu": 0, "buffer_count": 5, "buffer_size": options.buffer_size}
    optimizer = {"lr": 1e-4} if options.optimizer == "AdamW" else {"lr": 1e-4, "momentum": 0.9}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "steps_per_print": 1_000_000,
        "bf16": {"enabled": options.precision == "bf16"},
        "optimizer": {"type": options.optimizer, "params": optimizer},
        "zero_optimization": zero,
        "aio": {"block_size": options.block_size, "queue_depth": options.queue_depth},
    }


# -- a candidate's process ---------------------------------------------------------------------------------------------


def work(options: argparse.Namespace) -> None:
    """Take a step whenever a line comes in, and say on file descriptor 3 what it took."""
    import torch
    from gpt import GPT, GPTShape

    import deepspeed

    torch.set_num_threads(1)
    deepspeed.init_distributed(dist_backend="gloo")
    torch.manual_seed(0)
    model = GPT(GPTShape(options.layers, options.width, options.width // 64, options.vocabulary))
    count = sum(p.numel() for p in model.parameters())
    engine, *_ = deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=configuration(options))
    with os.fdopen(3, "w") as answers:
        for index, _ in enumerate(sys.stdin):
            tokens = torch.randint(0, options.vocabulary, (1, 33), generator=torch.Generator().manual_seed(index))
            began = counts(options.folder)
            engine.backward(engine(tokens))
            computed = counts(options.folder)
            engine.step()
            stepped = counts(options.folder)
            compute = {key: computed[key] - began[key] for key in began}
            step = {key: stepped[key] - computed[key] for key in began}
            print(json.dumps({"parameters": count, "compute": compute, "step": step}), file=answers, flush=True)


def counts(folder: Path) -> dict[str, float]:
    """The time in seconds, bytes that this process has read and written, and requests and bytes of the device of ``folder``."""
    lines = Path("/proc/self/io").read_text().splitlines()
    mine = {key: int(value) for key, _, value in (line.partition(": ") for line in lines)}
    number = folder.stat().st_dev
    stat = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}/stat")
    fields = [int(value) for value in stat.read_text().split()] if stat.exists() else [0] * 8
    return {
        "seconds": time.perf_counter(),
        "read": mine["read_bytes"],
        "written": mine["write_bytes"],
        "requests": fields[0] + fields[4],
        "request_bytes": (fields[2] + fields[6]) * SECTOR,
    }


# -- the run -----------------------------------------------------------------------------------------------------------


@dataclass
class Candidate:
    """A process that steps when it is told to; what it said of each step, and the limits around it."""

    name: str
    process: subprocess.Popen[str]
    answers: Any
    rounds: list[dict[str, Any]] = field(default_factory=list)

    def step(self) -> dict[str, Any]:
        """One step. RuntimeError where the process has ended."""
        assert self.process.stdin is not None, "made with a pipe"
        try:
            self.process.stdin.write("step\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass
        line = self.answers.readline()
        if not line:
            raise RuntimeError(f"{self.name}: the process ended with status {self.process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def start(name: str, python: str, folder: Path, stack: ExitStack) -> Candidate:
    """Start this script as a candidate, which ends with ``stack``."""
    read, write = os.pipe()
    worker = [sys.argv[0], str(folder), *sys.argv[2:], "--worker"]
    environment = {
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(random.randint(20_000, 60_000)),
        **os.environ,
    }
    shell = ["/bin/sh", "-c", f'exec "$@" 3>&{write} 1>&2', "sh"]
    process = subprocess.Popen([*shell, python, *worker], stdin=subprocess.PIPE, text=True, pass_fds=[write], env=environment)
    os.close(write)
    answers = stack.enter_context(os.fdopen(read))
    stack.callback(process.wait)
    stack.callback(process.kill)
    return Candidate(name, process, answers)


class Limit:
    """The rates of the disk, in bytes per second, for a file of its own that is moved past the page cache."""

    def __init__(self, folder: Path, options: argparse.Namespace, stack: ExitStack):
        import torch

        from deepspeed.native.file_engine import QueueOptions
        from deepspeed.native.files import FileQueue, aligned_empty

        self._memory = aligned_empty(options.limit_size << 20, torch.uint8)
        self._memory.random_(generator=torch.Generator().manual_seed(0))
        queue = stack.enter_context(FileQueue(QueueOptions(options.block_size, options.queue_depth)))
        self._file = stack.enter_context(queue.open(folder / "limit", nbytes=self._memory.nbytes))
        self.measure()

    def measure(self) -> tuple[float, float]:
        """Of reading and of writing, now."""
        from deepspeed.cli.nvme_bench import transfer

        times = [time.perf_counter()]
        for writing in (True, False):
            transfer(self._file, self._memory, writing=writing)
            times.append(time.perf_counter())
        nbytes = self._memory.nbytes
        return nbytes / (times[2] - times[1]), nbytes / (times[1] - times[0])


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of all candidates. What they leave in the directory is removed."""
    options.folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=options.folder, ignore_cleanup_errors=True)))
        pythons = [("deepspeed", sys.executable), *(text.partition("=")[::2] for text in options.compare)]
        candidates = [start(name, shutil.which(python) or python, folder, stack) for name, python in pythons]
        for candidate in candidates:
            for _ in range(WARM_UP):
                candidate.step()
        limit = Limit(folder, options, stack)
        before = limit.measure()
        for number in range(options.rounds):
            for candidate in random.Random(number).sample(candidates, len(candidates)):
                answer = candidate.step()
                after = limit.measure()
                candidate.rounds.append({**answer, "limits": [before, after]})
                before = after
    return [row(candidate, part) for candidate in candidates for part in ("compute", "step")]


def predicted(part: dict[str, float], limits: list[tuple[float, float]]) -> float:
    """Seconds in which the disk moves what ``part`` moved."""
    read, write = (statistics.harmonic_mean(rates) for rates in zip(*limits, strict=True))
    return part["read"] / read + part["written"] / write


def row(candidate: Candidate, part: str) -> dict[str, Any]:
    """Medians of one part of a step: forward and backward (``compute``), or ``step``."""
    parts = [(found[part], found["limits"]) for found in candidate.rounds]

    def median(values: Any) -> float:
        return statistics.median(list(values))

    return {
        "candidate": candidate.name,
        "part": part,
        "seconds": median(figures["seconds"] for figures, _ in parts),
        "read_bytes_per_parameter": parts[0][0]["read"] / candidate.rounds[0]["parameters"],
        "written_bytes_per_parameter": parts[0][0]["written"] / candidate.rounds[0]["parameters"],
        "limit_seconds": median(predicted(figures, limits) for figures, limits in parts),
        "of_limit": median(predicted(figures, limits) / figures["seconds"] for figures, limits in parts),
        "request_kibibytes": median(f["request_bytes"] / max(1, f["requests"]) / 1024 for f, _ in parts),
        "read_limit": median(rates[0] / 1e9 for _, limits in parts for rates in limits),
        "write_limit": median(rates[1] / 1e9 for _, limits in parts for rates in limits),
    }


def main() -> None:
    """Measure and print."""
    options = parse_arguments()
    if options.worker:
        work(options)
        return
    rows = run(options)
    print(f"{'':12} {'':8} {'s':>6} {'read B/p':>8} {'write B/p':>9} {'limit s':>8} {'of limit':>8} {'KiB/request':>11}")
    for name, part, seconds, read, written, limit, share, size, *_ in (figures.values() for figures in rows):
        print(f"{name:12} {part:8} {seconds:6.2f} {read:8.1f} {written:9.1f} {limit:8.2f} {share:8.2f} {size:11.0f}")
    print(f"the disk alone: reads {rows[0]['read_limit']:.2f} GB/s, writes {rows[0]['write_limit']:.2f} GB/s")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
