"""Train a GPT whose states are on a disk, in the memory of a few layers, on source code that is on every machine.

::

    deepspeed --num_gpus 1 examples/infinity/train.py --parameters 3.1e9 --steps 3

Parameters, gradients and optimizer states lie in files in ``--folder``; ``--parameters`` may be far more than memory holds.
Ctrl-C ends the step and saves, where the disk has room for that; the same command goes on from there.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import psutil
import torch
from display import DiskProgress, Traffic
from limits import READ, WRITTEN, Limits, measure_limits
from rich.console import Console
from room import STATES, Room, Shape, shape_of
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import deepspeed
from deepspeed.accelerator.process_memory import peak_resident_bytes, resident_bytes

sys.path += [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "train_lm")]
from model import GPT
from progress import StopRequest
from source_code import PYTHON, VOCABULARY, SourceCode

GOAL = 3.1e9
"""Parameters by default, where they fit."""

AIO = {"block_size": 1 << 20, "queue_depth": 16}
"""How the disk is used; ``deepspeed nvme-bench`` finds what is best for one."""


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    size = f"about how many, or 'largest' for what fits (default: {GOAL:g}, or the largest)"
    parser.add_argument("--parameters", default="", metavar="N", help=size)
    parser.add_argument("--folder", type=Path, default=Path("runs/infinity"), help="a directory on the disk to use")
    parser.add_argument("--memory", type=float, default=6, metavar="GB", help="of each process (default: %(default)s)")
    parser.add_argument("--disk", type=float, metavar="GB", help="of all processes (default: what is free)")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--context", type=int, default=64, help="tokens of a sequence; a token is a byte")
    parser.add_argument("--batch", type=int, default=2, help="sequences of a step, on each rank")
    parser.add_argument("--buffers", type=float, default=0.5, help="GB that the optimizer's step may have in memory")
    parser.add_argument("--lr", type=float, help="default: 0.01 / width")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args()


def choose_shape(options: argparse.Namespace) -> tuple[Shape, bool]:
    """The model to train, and whether a checkpoint of it has room too. Ends the program where it does not fit."""
    options.folder.mkdir(parents=True, exist_ok=True)
    free, memory = shutil.disk_usage(options.folder).free, psutil.virtual_memory().available
    room = Room(
        disk=int(min(free, (options.disk or free) * 1e9)),
        memory=int(min(memory, options.memory * 1e9)),
        base=resident_bytes(),
        buffers=int(options.buffers * 1e9),
    )
    tokens, batch = VOCABULARY + options.context, options.batch * options.context
    saved = options.folder / "shape.json"
    if saved.exists():
        return Shape(**json.loads(saved.read_text())), True
    largest = room.largest(GOAL if not options.parameters else 1e13, tokens, batch)
    if options.parameters in ("", "largest"):
        shape = largest or shape_of(1e4, tokens)
    else:
        shape = shape_of(float(options.parameters), tokens)
    if refusal := room.refusal(shape, batch):
        advice = f"give at most --parameters {largest.parameters:.2e}, or another --folder" if largest else "free some"
        sys.exit(f"{refusal}: {advice}")
    return shape, room.has_checkpoint(shape)


def configuration(shape: Shape, options: argparse.Namespace) -> dict[str, object]:
    """Everything on the disk."""
    disk = {"device": "nvme", "nvme_path": str(options.folder)}
    return {
        "train_micro_batch_size_per_gpu": options.batch,
        "optimizer": {"type": "AdamW", "params": {"lr": options.lr or 0.01 / shape.width}},
        "zero_optimization": {
            "stage": 3,
            "stage3_prefetch_bucket_size": 1,
            "offload_param": {**disk, "max_in_cpu": 0},
            "offload_optimizer": {**disk, "buffer_count": 4, "buffer_size": int(options.buffers * 1e9 / 16)},
        },
        "aio": AIO,
        "steps_per_print": 0,
    }


def make_engine(shape: Shape, options: argparse.Namespace, progress: DiskProgress) -> deepspeed.DeepSpeedEngine:
    """Construct the model on the disk, and let its blocks keep their inputs alone and compute the rest again in backward."""
    config = configuration(shape, options)
    torch.manual_seed(0)
    with deepspeed.zero.Init(config_dict_or_path=config):
        heads = shape.width // 64
        model = GPT(
            vocabulary=VOCABULARY, context=options.context, layers=shape.layers, width=shape.width, heads=heads
        )
    for index, block in enumerate(model.blocks):

        def run(x: Tensor, index: int, forward: object = block.forward) -> Tensor:
            progress.layer(index)
            return forward(x)

        block.forward = partial(checkpoint, run, index=index, use_reentrant=False)
    engine, *_ = deepspeed.initialize(model=model, config=config)
    return engine


def train(
    engine: deepspeed.DeepSpeedEngine, progress: DiskProgress, limits: Limits, shape: Shape, options: argparse.Namespace
) -> bool:
    """Take the steps that are left; returns False where Ctrl-C came before."""
    data = SourceCode(PYTHON, options.context + 1, limit=1000)
    disk = limits.disk_seconds(shape.parameters) / engine.world_size
    arithmetic = limits.arithmetic_seconds(shape.parameters, options.batch * options.context)
    with progress, StopRequest() as stop:
        for step in range(engine.global_steps, options.steps):
            began, traffic = time.perf_counter(), Traffic()
            first = (step * engine.world_size + engine.global_rank) * options.batch
            windows = torch.stack([data[(first + index) % len(data)]["input_ids"] for index in range(options.batch)])
            progress.phase("forward", step=step)
            loss = engine(windows[:, :-1], windows[:, 1:])
            progress.phase("backward", step=step)
            engine.backward(loss)
            computed = time.perf_counter() - began
            progress.phase("optimizer", step=step)
            engine.step()
            seconds = time.perf_counter() - began
            read, written = traffic.read / 1e9, traffic.written / 1e9
            progress.console.print(
                f"step {step + 1}: loss {float(loss.detach()):.3f}, {seconds:.1f} s ({computed:.1f} s forward and backward), "
                f"read {read:.1f} GB, wrote {written:.1f} GB, {(read + written) / seconds:.2f} GB/s; "
                f"limits: disk {disk:.1f} s, arithmetic {arithmetic:.1f} s; peak memory {peak_resident_bytes() / 1e9:.2f} GB"
            )
            if stop.on_any_rank():
                return False
    return True


def main() -> None:
    """Construct the model on the disk, or go on from a checkpoint, and take some steps."""
    options = parse_arguments()
    deepspeed.init_distributed()
    console = Console(quiet=torch.distributed.get_rank() != 0, highlight=False, soft_wrap=True)
    shape, saves = choose_shape(options)
    ranks = torch.distributed.get_world_size()
    limits = measure_limits(options.folder, AIO, tokens=options.batch * options.context, width=shape.width)
    console.print(
        f"{shape}, {shape.parameters * STATES / 1e9:.1f} GB of states in {options.folder}; the disk reads "
        f"{limits.read / 1e9:.2f} GB/s and writes {limits.write / 1e9:.2f}, a rank does {limits.multiply / 1e9:.0f} GFLOP/s"
    )
    progress = DiskProgress(options.steps, shape.parameters * (READ + WRITTEN) // ranks, shape.layers, console)
    started = time.perf_counter()
    engine = make_engine(shape, options, progress)
    checkpoints = options.folder / "checkpoints"
    if (checkpoints / "latest").exists():
        engine.load_checkpoint(checkpoints)
        console.print(f"going on from step {engine.global_steps}, which {checkpoints} has")
    console.print(f"on the disk after {time.perf_counter() - started:.0f} s, peak memory {peak_resident_bytes() / 1e9:.2f} GB")
    console.print("Ctrl-C ends the step and saves" if saves else "no room for a checkpoint: Ctrl-C ends the step without one")
    finished = train(engine, progress, limits, shape, options)
    if not finished and saves:
        engine.save_checkpoint(checkpoints)
        (options.folder / "shape.json").write_text(json.dumps(asdict(shape)))
        console.print(f"saved step {engine.global_steps} in {checkpoints}; the same command goes on")
    engine.destroy()
    if not finished:
        raise SystemExit(130)


if __name__ == "__main__":
    main()
