"""Time of an Adam step on the CPU against the memory traffic that it cannot do without, torch's and the original's.

::

    python benchmarks/adam.py --original OTHER_ENVIRONMENT/bin/python

The limit is Adam's traffic without its arithmetic (``stream.cpp``, compiled when this runs): four fp32 arrays read and three
written where they lie, in the fastest of several manners. With 16-bit gradients and parameters fewer bytes are needed: the
limit is that many bytes at the same rate. All candidates take turns, so that a machine that slows down slows all of them, and
the median of each counts. ``--original`` names the Python of an environment with the original package, which is driven by its
public interface (``original_adam.py``) and compiles its kernel itself.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from deepspeed import native
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.optim import AdamW

HERE = Path(__file__).parent
WAYS = ("as it comes", "asked for ahead", "non-temporal stores")
LR, WEIGHT_DECAY = 1e-3, 0.01
NBYTES = {"fp32": 28, "bf16 gradients": 28, "bf16 parameters": 22}
"""Bytes per element: states read and written, gradients read, parameters read and written, or masters and 16-bit parameters."""

Run = Callable[[], float]
"""Does one step and returns its seconds."""


def timed(work: Callable[[], object]) -> Run:
    """``work`` with a clock around it."""

    def run() -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    return run


def stream_library() -> ctypes.CDLL:
    """``stream.cpp``, compiled for this machine by the compiler ``CXX`` (c++ where it is not set)."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "stream.so"
        flags = ["-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-pthread"]
        subprocess.run([os.environ.get("CXX", "c++"), *flags, str(HERE / "stream.cpp"), "-o", str(library)], check=True)
        return ctypes.CDLL(str(library))


def limits(numel: int, threads: int) -> dict[str, Run]:
    """Adam's traffic in each manner."""
    library = stream_library()
    arrays = [torch.ones(numel) for _ in range(4)]
    addresses = [ctypes.c_void_p(array.data_ptr()) for array in arrays]

    def runner(way: int) -> Run:
        work = timed(lambda: library.adam_stream(*addresses, ctypes.c_size_t(numel), threads, way))
        return lambda: work() if arrays else 0.0  # they live as long as this does

    return {name: runner(way) for way, name in enumerate(WAYS)}


def ours(numel: int) -> dict[str, Run]:
    """This package's: fp32; an fp32 master with bf16 gradients and parameters; bf16 parameters with fp32 states."""
    fp32, masters = AdamW([torch.randn(numel)], lr=LR), AdamW([torch.randn(numel)], lr=LR)
    gradient, narrow, out = torch.randn(numel), torch.randn(numel).bfloat16(), torch.empty(numel, dtype=torch.bfloat16)
    sixteen = torch.nn.Parameter(torch.randn(numel).bfloat16())
    sixteen.grad = narrow
    alone = DeepSpeedCPUAdam([sixteen], lr=LR, weight_decay=WEIGHT_DECAY)
    own, master = fp32.param_groups[0]["params"][0], masters.param_groups[0]["params"][0]
    return {
        "fp32": timed(lambda: fp32.step_shard(own, gradient, gradient_scale=1.0, out=None)),
        "bf16 gradients": timed(lambda: masters.step_shard(master, narrow, gradient_scale=0.5, out=out)),
        "bf16 parameters": timed(alone.step),
    }


def torchs(numel: int) -> dict[str, Run]:
    """torch's fused AdamW: fp32, and with the casts that bf16 gradients and parameters need."""
    parameter, narrow, out = torch.randn(numel), torch.randn(numel).bfloat16(), torch.empty(numel, dtype=torch.bfloat16)
    optimizer = torch.optim.AdamW([parameter], lr=LR, weight_decay=WEIGHT_DECAY, fused=True)
    parameter.grad = torch.randn(numel)

    def with_casts() -> None:
        assert parameter.grad is not None, "it was set above"
        parameter.grad.copy_(narrow).mul_(0.5)
        optimizer.step()
        out.copy_(parameter)

    return {"fp32": timed(optimizer.step), "bf16 gradients": timed(with_casts)}


class Original:
    """The original's CPU Adam, in a process of its own."""

    def __init__(self, python: Path, numel: int):
        # Its kernel is compiled by the ninja beside its Python.
        environment = {**os.environ, "PATH": f"{python.parent}:{os.environ['PATH']}"}
        command = [str(python), str(HERE / "original_adam.py"), str(numel)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=tempfile.gettempdir(), env=environment
        )
        self._answer("ready")

    def step(self, case: str, threads: int) -> float:
        """Seconds of one step."""
        assert self._process.stdin is not None, "it is a pipe"
        self._process.stdin.write(f"{case} {threads}\n")
        self._process.stdin.flush()
        return float(self._answer("seconds"))

    def _answer(self, word: str) -> str:
        assert self._process.stdout is not None, "it is a pipe"
        for line in self._process.stdout:  # it writes messages of its own, too
            if line.startswith(word):
                return line.removeprefix(word)
        raise SystemExit(f"the original's process ended with {self._process.wait()} before it said '{word}'")


def measure(runs: dict[tuple[str, str], Run], rounds: int) -> dict[tuple[str, str], float]:
    """Median seconds of each, after one round that does not count."""
    times: dict[tuple[str, str], list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            seconds = run()
            if number:
                times[name].append(seconds)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    """Measure with each number of threads, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numel", type=int, default=1 << 25, help="elements of each tensor (default 33554432)")
    parser.add_argument("--rounds", type=int, default=9, help="timed steps of each candidate (default 9)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="numbers of threads (default 1 2)")
    parser.add_argument("--original", type=Path, help="the Python of an environment with the original package")
    options = parser.parse_args()
    original = Original(options.original, options.numel) if options.original else None
    print(f"{options.numel} elements, {native.status()}, torch {torch.__version__}; milliseconds (part of the limit)")
    for threads in options.threads:
        torch.set_num_threads(threads)
        runs = {("limit", way): run for way, run in limits(options.numel, threads).items()}
        for who, cases in (("deepspeed", ours(options.numel)), ("torch fused", torchs(options.numel))):
            runs |= {(case, who): run for case, run in cases.items()}
        if original is not None:
            for case, name in (("fp32", "fp32"), ("bf16 parameters", "bf16")):
                runs[case, "original"] = lambda name=name, threads=threads: original.step(name, threads)
        medians = measure(runs, options.rounds)
        limit = min(seconds for (case, _), seconds in medians.items() if case == "limit")
        print(f"{threads} thread{'s'[: threads > 1]}: limit {28 * options.numel / limit / 1e9:.1f} GB/s")
        for (case, who), seconds in sorted(medians.items(), key=lambda item: item[0][0]):
            part = limit / seconds * NBYTES.get(case, 28) / 28
            print(f"  {case:16} {who:20} {seconds * 1e3:8.2f}  {part:6.2f}", flush=True)


if __name__ == "__main__":
    main()
