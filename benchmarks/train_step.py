"""Step time, memory and traffic of data-parallel training, the same work under different engines.

One engine, on two gloo ranks of this machine::

    python benchmarks/train_step.py --engine deepspeed --stage 2

Several, a run of each in turn, round after round, so that a machine that slows down slows all of them::

    python benchmarks/train_step.py --compare ddp=python:ddp --compare ours=python:deepspeed:2 \\
        --compare original=/other/environment/bin/python:deepspeed:2

Every rank has one thread. Ranks are started by this script, which sets RANK, WORLD_SIZE, MASTER_ADDR and so on, as
torchrun would.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ranks import run_ranks

BENCHMARK_OPTIONS = ("layers", "width", "heads", "vocabulary", "context", "micro_batch", "accumulation", "steps")
LARGEST = ("peak_bytes", "resident_bytes", "state_bytes", "cpu_seconds")
"""Figures of which the largest rank's counts."""


@dataclass(frozen=True)
class Candidate:
    """One engine in one interpreter's environment."""

    name: str
    python: str
    engine: str
    stage: int = 2
    optimizer: str = "config"
    environment: dict[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> Candidate:
        """From ``NAME=PYTHON:ENGINE[:STAGE[:OPTIMIZER]][@KEY=VALUE,...]``. Raises ValueError for anything else."""
        head, _, pairs = text.partition("@")
        name, equals, rest = head.partition("=")
        parts = rest.split(":")
        if not equals or not 2 <= len(parts) <= 4:
            raise ValueError(f"'{text}' is not NAME=PYTHON:ENGINE[:STAGE[:OPTIMIZER]][@KEY=VALUE,...]")
        python = shutil.which(parts[0])
        if python is None:
            raise ValueError(f"'{text}': there is no interpreter '{parts[0]}'")
        return cls(
            name,
            python,
            parts[1],
            int(parts[2]) if len(parts) > 2 else 2,
            parts[3] if len(parts) > 3 else "config",
            dict(pair.split("=", 1) for pair in pairs.split(",") if pair),
        )


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=["deepspeed", "ddp", "fsdp2"], default="ddp")
    parser.add_argument("--stage", type=int, default=2, help="ZeRO stage of deepspeed and fsdp2 (default 2)")
    parser.add_argument(
        "--optimizer",
        choices=["config", "torch_adam", "client"],
        default="config",
        help="deepspeed's AdamW, deepspeed's with torch_adam, or torch's fused AdamW handed to initialize",
    )
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--warmup", type=int, default=2, help="steps before the timed ones")
    parser.add_argument("--steps", type=int, default=5, help="timed steps")
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches per step")
    parser.add_argument("--micro-batch", type=int, default=2)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=640)
    parser.add_argument("--heads", type=int, default=10)
    parser.add_argument("--vocabulary", type=int, default=16384)
    parser.add_argument("--json", type=Path, help="write the figures there too")
    parser.add_argument(
        "--compare",
        action="append",
        metavar="NAME=PYTHON:ENGINE[:STAGE[:OPTIMIZER]][@KEY=VALUE,...]",
        help="a candidate, with environment variables after '@'; give it several times, the first is the base of ratios",
    )
    parser.add_argument("--rounds", type=int, default=3, help="runs of each candidate with --compare")
    return parser.parse_args(arguments)


def train(options: argparse.Namespace) -> dict[str, Any]:
    """One rank's run: warm up, time the steps, then count memory and traffic in steps that are not timed.

    Returns the figures of all ranks: times of the slowest, memory of the largest.
    """
    import torch
    import torch.distributed as dist
    from engines import Setup, build_engine
    from gpt import GPT, GPTShape
    from measure import live_tensor_bytes, loopback_bytes, reset_peak, resident_bytes

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = GPT(GPTShape(options.layers, options.width, options.heads, options.vocabulary, options.context))
    parameters = sum(p.numel() for p in model.parameters())
    parameter_bytes = parameters * (2 if options.precision == "bf16" and options.engine == "deepspeed" else 4)
    setup = Setup(
        options.engine, options.stage, options.accumulation, options.precision, options.micro_batch, options.optimizer
    )
    engine = build_engine(model, setup)
    generator = torch.Generator().manual_seed(1000 + rank)

    def micro_batches() -> list[torch.Tensor]:
        size = (options.micro_batch, options.context + 1)
        return [torch.randint(options.vocabulary, size, generator=generator) for _ in range(options.accumulation)]

    def backward(batches: list[torch.Tensor]) -> float:
        losses = [engine.backward(tokens, last=i == len(batches) - 1) for i, tokens in enumerate(batches)]
        return torch.stack(losses).mean().item()

    seconds, cpu_seconds, losses = [], [], []
    for step in range(options.warmup + options.steps):
        batches = micro_batches()
        if step == options.warmup:
            reset_peak()
        dist.barrier()
        start, cpu_start = time.perf_counter(), time.process_time()
        losses.append(backward(batches))
        engine.step()
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - cpu_start)
    figures: dict[str, Any] = {
        "seconds": seconds[options.warmup :],
        "cpu_seconds": statistics.median(cpu_seconds[options.warmup :]),
        "loss": losses[-1],
        "peak_bytes": resident_bytes("VmHWM"),
        "resident_bytes": resident_bytes(),
    }
    traffic = []
    for _ in range(2):
        batches = micro_batches()
        dist.barrier()
        before = loopback_bytes()
        dist.barrier()
        backward(batches)
        figures["state_bytes"] = live_tensor_bytes(excluded=batches)
        engine.step()
        dist.barrier()
        traffic.append(loopback_bytes() - before)
    figures["wire_bytes"] = min(traffic) / ranks
    gathered: list[dict[str, Any]] = [{} for _ in range(ranks)]
    dist.all_gather_object(gathered, figures)
    dist.barrier()
    return _merge(gathered, parameters=parameters, parameter_bytes=parameter_bytes)


def _merge(gathered: list[dict[str, Any]], *, parameters: int, parameter_bytes: int) -> dict[str, Any]:
    ranks = len(gathered)
    slowest = [max(times) for times in zip(*(figures["seconds"] for figures in gathered), strict=True)]
    largest = {key: max(f[key] for f in gathered) for key in LARGEST}
    # A ring sends (n - 1) / n of a buffer per pass, which is what "P" stands for in ZeRO's accounting.
    passes = gathered[0]["wire_bytes"] / parameter_bytes * ranks / max(ranks - 1, 1)
    return {
        **largest,
        "parameters": parameters,
        "step_seconds": statistics.median(slowest),
        "loss": sum(f["loss"] for f in gathered) / ranks,
        "state_bytes_per_parameter": largest["state_bytes"] / parameters,
        "wire_bytes": gathered[0]["wire_bytes"],
        "wire_volume": passes,
    }


def measure(candidate: Candidate, options: argparse.Namespace) -> dict[str, Any]:
    """Start the ranks of ``candidate`` and return their figures. Raises RuntimeError where one fails."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "figures.json"
        command = [candidate.python, str(Path(__file__).resolve()), "--engine", candidate.engine]
        command += ["--stage", str(candidate.stage), "--optimizer", candidate.optimizer]
        command += ["--precision", options.precision, "--warmup", str(options.warmup), "--json", str(report)]
        for key in BENCHMARK_OPTIONS:
            command += [f"--{key.replace('_', '-')}", str(getattr(options, key))]
        run_ranks(command, options.ranks, name=candidate.name, environment=candidate.environment)
        figures: dict[str, Any] = json.loads(report.read_text())
        return figures


def compare(candidates: list[Candidate], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Run every candidate in turn, ``rounds`` times, and return the median figures of each, with the range of times."""
    runs: dict[str, list[dict[str, Any]]] = {candidate.name: [] for candidate in candidates}
    for number in range(options.rounds):
        for candidate in candidates:
            figures = measure(candidate, options)
            print(f"round {number + 1} {candidate.name}: {figures['step_seconds']:.3f} s", file=sys.stderr, flush=True)
            runs[candidate.name].append(figures)
    results = []
    for name, figures_list in runs.items():
        row: dict[str, Any] = {key: statistics.median(figures[key] for figures in figures_list) for key in figures_list[0]}
        times = [figures["step_seconds"] for figures in figures_list]
        results.append({"name": name, **row, "fastest_seconds": min(times), "slowest_seconds": max(times)})
    return results


def print_table(results: list[dict[str, Any]]) -> None:
    """Print the figures; ratios are to the first row."""
    print(f"{'':16} {'step s':>7} {'range':>13} {'ratio':>6} {'cpu s':>6} {'state B/param':>13} {'state MB':>8} ", end="")
    print(f"{'peak MB':>8} {'rss MB':>7} {'wire P':>7} {'loss':>11}")
    for row in results:
        spread = f"{row['fastest_seconds']:.3f}-{row['slowest_seconds']:.3f}"
        ratio = row["step_seconds"] / results[0]["step_seconds"]
        print(f"{row['name']:16} {row['step_seconds']:7.3f} {spread:>13} {ratio:6.3f} {row['cpu_seconds']:6.3f} ", end="")
        print(f"{row['state_bytes_per_parameter']:13.2f} {row['state_bytes'] / 1e6:8.0f} ", end="")
        print(f"{row['peak_bytes'] / 1e6:8.0f} {row['resident_bytes'] / 1e6:7.0f} ", end="")
        print(f"{row['wire_volume']:7.2f} {row['loss']:11.6f}")


def main() -> None:
    """Be a rank where RANK is set; otherwise start ranks, and print what they measured."""
    options = parse_arguments()
    if "RANK" in os.environ:
        figures = train(options)
        if os.environ["RANK"] == "0" and options.json:
            options.json.write_text(json.dumps(figures))
        sys.stdout.flush()
        # Threads of the gloo backend that still run while the interpreter is torn down can abort a finished process.
        os._exit(0)
    if options.compare:
        candidates = [Candidate.parse(text) for text in options.compare]
    else:
        name = options.engine if options.engine == "ddp" else f"{options.engine}-{options.stage}"
        candidates = [Candidate(name, sys.executable, options.engine, options.stage, options.optimizer)]
        options.rounds = 1
    results = compare(candidates, options)
    print_table(results)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
