"""Train a GPT whose states are on a disk, in the memory of a few layers, on source code that is on every machine.

::

    deepspeed --num_gpus 1 examples/infinity/train.py --parameters 1e9 --steps 3

Parameters, gradients and optimizer states lie in files in ``--folder``; ``--parameters`` may be far more than memory holds.
"""

from __future__ import annotations

import argparse
import resource
import shutil
import sys
import time
from functools import partial
from pathlib import Path

import torch
from torch.utils.checkpoint import checkpoint

import deepspeed

sys.path.append(str(Path(__file__).parents[1]))
from source_code import PYTHON, VOCABULARY, SourceCode

sys.path.append(str(Path(__file__).parents[1] / "train_lm"))
from model import GPT

BYTES_PER_PARAMETER = 16
"""On the disk, fp32: the parameter, its gradient and Adam's two moments."""


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parameters", type=float, default=1e9, help="about how many (default: 1e9)")
    parser.add_argument("--folder", type=Path, default=Path("runs/infinity"), help="a directory on the disk to use")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--context", type=int, default=128, help="tokens of a sequence; a token is a byte")
    parser.add_argument("--batch", type=int, default=2, help="sequences of a step, on each rank")
    parser.add_argument("--buffers", type=float, default=0.5, help="GB that the optimizer's step may have in memory")
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args()


def shape_of(parameters: float) -> tuple[int, int]:
    """Layers and width of a GPT of about so many parameters: 12 * layers * width^2, its width 128 times its layers at most."""
    width = 64
    while 12 * (width // 64) * width**2 < parameters and width < 8192:
        width += 64
    return max(1, round(parameters / (12 * width**2))), width


def check_room(folder: Path, parameters: int) -> None:
    """End with the arithmetic where the states do not fit on the disk."""
    folder.mkdir(parents=True, exist_ok=True)
    needed, free = parameters * BYTES_PER_PARAMETER, shutil.disk_usage(folder).free
    if needed > free:
        most = free // BYTES_PER_PARAMETER
        sys.exit(
            f"{parameters / 1e9:.2f} G parameters need {BYTES_PER_PARAMETER} bytes each, {needed / 1e9:.1f} GB, and {folder} "
            f"has {free / 1e9:.1f} GB free: give at most --parameters {most:.2e}, or another --folder"
        )


def configuration(options: argparse.Namespace) -> dict[str, object]:
    """Everything on the disk."""
    disk = {"device": "nvme", "nvme_path": str(options.folder)}
    return {
        "train_micro_batch_size_per_gpu": options.batch,
        "optimizer": {"type": "AdamW", "params": {"lr": options.lr}},
        "zero_optimization": {
            "stage": 3,
            "stage3_prefetch_bucket_size": 1,
            "offload_param": {**disk, "max_in_cpu": 0},
            "offload_optimizer": {**disk, "buffer_count": 4, "buffer_size": int(options.buffers * 1e9 / 16)},
        },
        "aio": {"block_size": 1 << 20, "queue_depth": 16},
    }


def peak_memory() -> float:
    """The most memory that this process has had, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def main() -> None:
    """Construct the model on the disk and take some steps."""
    options = parse_arguments()
    layers, width = shape_of(options.parameters)
    count = 12 * layers * width**2 + (VOCABULARY + options.context) * width
    check_room(options.folder, count)
    config = configuration(options)
    torch.manual_seed(0)
    started = time.perf_counter()
    with deepspeed.zero.Init(config_dict_or_path=config):
        shape = {"layers": layers, "width": width, "heads": width // 64}
        model = GPT(vocabulary=VOCABULARY, context=options.context, **shape)
    for block in model.blocks:  # it keeps its input, and computes the rest again in backward
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    engine, *_ = deepspeed.initialize(model=model, config=config)
    print(f"{count / 1e9:.2f} G parameters ({layers} layers of width {width}), {count * 16 / 1e9:.1f} GB of states")
    print(f"on the disk after {time.perf_counter() - started:.0f} s, peak memory {peak_memory():.2f} GB", flush=True)
    data = SourceCode(PYTHON, options.context + 1, limit=1000)
    rank, ranks = engine.global_rank, engine.world_size
    for step in range(options.steps):
        began = time.perf_counter()
        first = (step * ranks + rank) * options.batch
        windows = torch.stack([data[(first + index) % len(data)]["input_ids"] for index in range(options.batch)])
        loss = engine(windows[:, :-1], windows[:, 1:])
        engine.backward(loss)
        computed = time.perf_counter() - began
        engine.step()
        seconds = time.perf_counter() - began
        if rank == 0:
            print(
                f"step {step + 1}: loss {float(loss.detach()):.3f}, {seconds:.1f} s ({computed:.1f} s forward and backward), "
                f"peak memory {peak_memory():.2f} GB",
                flush=True,
            )
    engine.destroy()


if __name__ == "__main__":
    main()
