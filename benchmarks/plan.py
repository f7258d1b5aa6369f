"""Train a model as ``deepspeed plan`` would, and show the peak memory of a rank beside the planned one.

::

    python benchmarks/plan.py --model 100M --ranks 2 --ways 1:nothing 3:optimizer --context 256
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from ranks import run_ranks

import deepspeed
from deepspeed.accelerator.process_memory import peak_resident_bytes
from deepspeed.cli.plan_candidates import WAYS, Candidate, Hardware, candidates
from deepspeed.cli.plan_model import Workload, enable_checkpointing, loss_of, model_maker, trace_model
from deepspeed.cli.rates import base_bytes
from deepspeed.memory.demand import Rates

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
STEPS = 2


@dataclass(frozen=True)
class Row:
    """Bytes of one way to train: the peak that was planned for a rank, and the largest that was measured."""

    way: str
    planned: float
    measured: int


def main() -> None:
    """Run each way in processes of its own, and print the rows."""
    options = _arguments()
    if options.rank_of is not None:
        _train(options)
        return
    make, what = model_maker(options.model)
    workload = _workload(options)
    model, trace = trace_model(make, workload)
    rates = Rates(1e10, 1e10, 1e9, 1e9)
    rows = []
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        hardware = Hardware(options.memory, 1 << 40, options.ranks, folder)
        base = options.base or base_bytes()
        found = candidates(model, trace, workload, hardware, rates, base=base)
        named = {f"{c.settings.stage}:{c.on_disk}": c for c in found}
        numel = found[0].layout.parameter_numel
        print(f"{numel / 1e9:.3f} G parameters ({what}), {options.ranks} ranks, base {base / 1e9:.3f} GB", flush=True)
        for way in options.ways:
            rows.append(_measure(way, named[way], Path(folder)))
            row = rows[-1]
            print(
                f"{way:24}  planned {row.planned / 1e9:6.3f} GB  measured {row.measured / 1e9:6.3f} GB  "
                f"planned / measured {row.planned / row.measured:.3f}",
                flush=True,
            )
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(row) for row in rows]))


def _measure(way: str, candidate: Candidate, folder: Path) -> Row:
    file = folder / "config.json"
    file.write_text(json.dumps({**candidate.configuration, "steps_per_print": 0}))
    command = [sys.executable, __file__, *sys.argv[1:], "--rank-of", str(file)]
    run_ranks(command, candidate.settings.ranks, name=way)
    peaks = [int(path.read_text()) for path in folder.glob("peak-*")]
    return Row(way, candidate.needs.peak, max(peaks))


def _train(options: argparse.Namespace) -> None:
    """As one rank: take some steps, and leave the peak beside the configuration."""
    workload, config = _workload(options), json.loads(options.rank_of.read_text())
    make, _ = model_maker(options.model)
    deepspeed.init_distributed()
    torch.manual_seed(0)
    sharded = config["zero_optimization"]["stage"] == 3
    with deepspeed.zero.Init(config_dict_or_path=config) if sharded else nullcontext():
        model = make(torch.float32)
    if workload.checkpointing:
        enable_checkpointing(model)
    engine, *_ = deepspeed.initialize(model=model.train(), config=config)
    tokens = torch.randint(1000, (workload.sequences, workload.context))
    for _ in range(STEPS):
        engine.backward(loss_of(engine, tokens) if hasattr(model, "config") else engine(tokens))
        engine.step()
    options.rank_of.with_name(f"peak-{engine.global_rank}").write_text(str(peak_resident_bytes()))
    engine.destroy()


def _workload(options: argparse.Namespace) -> Workload:
    return Workload(options.micro_batch, options.context, DTYPES[options.precision], options.checkpointing)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="100M", metavar="PATH|SIZE")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--ways", nargs="+", default=[f"{stage}:{tier}" for stage, tier in WAYS], metavar="STAGE:ON_DISK")
    parser.add_argument("--micro-batch", type=int, default=1)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--precision", choices=DTYPES, default="fp32")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--memory", type=int, default=4 << 30, help="bytes, of which a quarter is for the optimizer's step")
    parser.add_argument("--base", type=int, help="bytes of Python and libraries (default: this process's)")
    parser.add_argument("--folder", type=Path, default=Path())
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too")
    parser.add_argument("--rank-of", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
