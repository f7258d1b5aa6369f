"""Time and memory of constructing a model that is to be trained in shards, on gloo ranks of this machine.

The same transformer (1.0 G parameters by default), by turns::

    python benchmarks/construction.py
    python benchmarks/construction.py --layers 6 --candidates deepspeed fsdp2 --initialize twice

Candidates end with a bf16 model, all but the plain ones in shards:

- ``plain``: constructed whole on every rank in fp32, then converted; ``plain-bf16``: with bf16 as the default dtype.
- ``fsdp2``: torch's recipe: constructed in bf16 on the meta device, ``fully_shard``, ``to_empty``, then each module's
  ``reset_parameters`` in shards. Its values are not those of plain construction.
- ``deepspeed``: ``zero.Init`` around the construction in fp32; ``deepspeed-bf16``: with bf16 as the default dtype.

``--initialize twice`` adds what most training scripts do: a function for all modules that draws the weights again.
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

CANDIDATES = ("plain", "plain-bf16", "fsdp2", "deepspeed", "deepspeed-bf16")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", nargs="+", choices=CANDIDATES, default=["plain", "fsdp2", "deepspeed"])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--initialize", choices=["once", "twice"], default="once")
    parser.add_argument("--candidate", choices=CANDIDATES, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help="write the figures there too")
    return parser.parse_args(arguments)


def construct(options: argparse.Namespace) -> dict[str, Any]:
    """One rank's run of ``options.candidate``. Returns the figures of the slowest and largest rank."""
    import torch
    import torch.distributed as dist
    from measure import reset_peak, resident_bytes

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    make = _maker(options)
    torch.manual_seed(0)
    dist.barrier()
    reset_peak()
    before, start, cpu_start = resident_bytes(), time.perf_counter(), time.process_time()
    model = make()
    cpu_seconds = time.process_time() - cpu_start
    dist.barrier()
    seconds = time.perf_counter() - start
    figures = {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "peak_bytes": resident_bytes("VmHWM") - before,
        "resident_bytes": resident_bytes() - before,
        "start_bytes": before,
    }
    gathered: list[dict[str, float]] = [{} for _ in range(options.ranks)]
    dist.all_gather_object(gathered, figures)
    dist.barrier()
    numel = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
    return {"parameters": numel, **{key: max(rank[key] for rank in gathered) for key in figures}}


def _maker(options: argparse.Namespace) -> Callable[[], Any]:
    """Construction by ``options.candidate``, with what it imports imported."""
    import torch
    from torch import nn

    name = options.candidate
    if name.endswith("-bf16") or name == "fsdp2":
        torch.set_default_dtype(torch.bfloat16)
    if name.startswith("plain"):
        return lambda: _model(options).to(torch.bfloat16)
    if name == "fsdp2":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (options.ranks,))
        warm = nn.Linear(8, 8, device="meta")
        fully_shard(warm, mesh=mesh)
        warm.to_empty(device="cpu").reset_parameters()

        def shard() -> nn.Module:
            with torch.device("meta"):
                model = _model(options)
            for block in model.blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh)
            model.to_empty(device="cpu")
            for module in model.modules():
                if hasattr(module, "reset_parameters"):
                    module.reset_parameters()
            if options.initialize == "twice":
                model.initialize()
            return model

        return shard

    import deepspeed

    config = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 3}}
    with deepspeed.zero.Init(config_dict_or_path=config):
        nn.Linear(512, 512)

    def initialize() -> nn.Module:
        with deepspeed.zero.Init(config_dict_or_path=config):
            return _model(options)

    return initialize


def _model(options: argparse.Namespace) -> Any:
    import torch
    from gpt import Block, GPTShape
    from torch import nn

    shape = GPTShape(options.layers, options.width, options.heads, options.vocabulary)

    class Transformer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(shape.vocabulary, shape.width)
            self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
            self.norm = nn.LayerNorm(shape.width)
            self.head = nn.Linear(shape.width, shape.vocabulary, bias=False)
            if options.initialize == "twice" and not self.head.weight.is_meta:
                self.initialize()

        @torch.no_grad()
        def initialize(self) -> None:
            for parameter in self.parameters():
                if parameter.dim() == 2:
                    parameter.normal_(std=0.02)

    return Transformer()


def compare(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Run every candidate in turn, ``rounds`` times, and return the medians of each, with the range of times."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in options.candidates}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "figures.json"
        keys = ("ranks", "layers", "width", "heads", "vocabulary", "initialize")
        sizes = [f"--{key}={getattr(options, key)}" for key in keys]
        for number in range(options.rounds):
            for name in options.candidates:
                command = [sys.executable, str(Path(__file__).resolve()), "--candidate", name, "--json", str(report), *sizes]
                run_ranks(command, options.ranks, name=name)
                runs[name].append(json.loads(report.read_text()))
                print(f"round {number + 1} {name}: {runs[name][-1]['seconds']:.2f} s", file=sys.stderr, flush=True)
    results = []
    for name, figures in runs.items():
        row = {key: statistics.median(run[key] for run in figures) for key in figures[0]}
        times = [run["seconds"] for run in figures]
        results.append({"name": name, **row, "fastest_seconds": min(times), "slowest_seconds": max(times)})
    return results


def print_table(results: list[dict[str, Any]]) -> None:
    """Print the figures: times also relative to the first row, memory on top of what the process had at the start, in
    units of the bf16 model too."""
    print(f"{'':16} {'s':>7} {'range':>13} {'ratio':>6} {'cpu s':>6} {'peak MB':>8} {'peak / model':>12} ", end="")
    print(f"{'after MB':>8} {'start MB':>8}")
    for row in results:
        spread = f"{row['fastest_seconds']:.2f}-{row['slowest_seconds']:.2f}"
        ratio, model = row["seconds"] / results[0]["seconds"], 2 * row["parameters"]
        print(f"{row['name']:16} {row['seconds']:7.2f} {spread:>13} {ratio:6.2f} {row['cpu_seconds']:6.2f} ", end="")
        print(f"{row['peak_bytes'] / 1e6:8.0f} {row['peak_bytes'] / model:12.2f} ", end="")
        print(f"{row['resident_bytes'] / 1e6:8.0f} {row['start_bytes'] / 1e6:8.0f}")
    print(f"{results[0]['parameters'] / 1e6:.0f} M parameters")


def main() -> None:
    """Be a rank where RANK is set; otherwise start ranks, and print what they measured."""
    options = parse_arguments()
    if "RANK" in os.environ:
        figures = construct(options)
        if os.environ["RANK"] == "0":
            options.json.write_text(json.dumps(figures))
        sys.stdout.flush()
        # Threads of the gloo backend that still run while the interpreter is torn down can abort a finished process.
        os._exit(0)
    results = compare(options)
    print_table(results)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
