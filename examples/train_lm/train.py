"""Train a GPT with ZeRO on the source code of Python's standard library, or any text.

deepspeed --num_gpus 2 examples/train_lm/train.py --deepspeed_config examples/train_lm/ds_config.json
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path

import psutil
import torch
import torch.distributed as dist
from data import Corpus, load_corpus
from model import GPT, generate
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

import deepspeed


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default=None, help="text file or directory; Python's standard library where absent")
    parser.add_argument("--output", default="runs/train_lm", help="directory of checkpoints and caches")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps in all")
    parser.add_argument("--stage", type=int, default=None, help="ZeRO stage; the configuration's where absent")
    parser.add_argument("--precision", choices=["fp32", "bf16", "fp16"], default="fp32")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=320)
    parser.add_argument("--heads", type=int, default=5)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--fresh", action="store_true", help="start anew though there is a checkpoint")
    return deepspeed.add_config_arguments(parser).parse_args()


def make_engine(arguments: argparse.Namespace) -> deepspeed.DeepSpeedEngine:
    config = json.loads(Path(arguments.deepspeed_config).read_text())
    if arguments.stage is not None:
        config.setdefault("zero_optimization", {})["stage"] = arguments.stage
    if arguments.precision != "fp32":
        config[arguments.precision] = {"enabled": True}
    torch.manual_seed(0)
    model = GPT(
        vocabulary=arguments.vocabulary,
        context=arguments.context,
        layers=arguments.layers,
        width=arguments.width,
        heads=arguments.heads,
    )
    return deepspeed.initialize(model=model, config=config)[0]


@torch.no_grad()
def validation_loss(engine: deepspeed.DeepSpeedEngine, corpus: Corpus, batches: int = 8) -> float:
    """The mean loss over the same held-out windows at each call, averaged over ranks."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    size = engine.train_micro_batch_size_per_gpu()
    context = engine.module.context
    engine.eval()
    losses = [engine(*corpus.batch(generator, size=size, context=context, validation=True)) for _ in range(batches)]
    engine.train()
    total = torch.stack(losses).mean()
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


class StopRequest:
    """Whether any rank was asked to stop, by Ctrl-C or SIGTERM."""

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: object) -> None:
        self.asked = True

    def agreed(self) -> bool:
        """The same answer on every rank."""
        flag = torch.tensor(float(self.asked))
        dist.all_reduce(flag)
        return flag.item() > 0


def train(engine: deepspeed.DeepSpeedEngine, corpus: Corpus, steps: int, console: Console) -> bool:
    """Train until step ``steps``; returns False where it was asked to stop before."""
    stop = StopRequest()
    size, context = engine.train_micro_batch_size_per_gpu(), engine.module.context
    tokens_per_step = engine.train_batch_size() * context
    columns = ("loss {task.fields[loss]:.3f}", "{task.fields[speed]:.0f} tokens/s", "lr {task.fields[rate]:.1e}")
    text = [TextColumn(column) for column in (*columns, "{task.fields[memory]:.0f} MB/rank")]
    bar = Progress(TextColumn("step {task.completed}/{task.total}"), BarColumn(), *text, TimeRemainingColumn(), console=console)
    with bar:
        fields = {"loss": 0.0, "speed": 0.0, "rate": 0.0, "memory": 0.0}
        task = bar.add_task("train", total=steps, completed=engine.global_steps, **fields)
        while engine.global_steps < steps:
            started = time.perf_counter()
            for _ in range(engine.gradient_accumulation_steps()):
                seed = engine.micro_steps * dist.get_world_size() + dist.get_rank()
                generator = torch.Generator().manual_seed(1000 + seed)
                loss = engine(*corpus.batch(generator, size=size, context=context))
                engine.backward(loss)
                engine.step()
            bar.update(
                task,
                completed=engine.global_steps,
                loss=loss.item(),
                speed=tokens_per_step / (time.perf_counter() - started),
                rate=engine.get_lr()[0],
                memory=psutil.Process().memory_info().rss / 1e6,
            )
            if stop.agreed():
                return False
    return True


def main() -> None:
    arguments = parse_arguments()
    deepspeed.init_distributed()
    first = dist.get_rank() == 0
    console = Console(quiet=not first)
    output = Path(arguments.output)
    if first:
        console.print("reading and tokenizing the text ...")
        load_corpus(arguments.data, vocabulary=arguments.vocabulary, cache=output / "cache")
    dist.barrier()
    corpus = load_corpus(arguments.data, vocabulary=arguments.vocabulary, cache=output / "cache")
    engine = make_engine(arguments)
    numel = sum(p.numel() for p in engine.parameters())
    console.print(f"{numel / 1e6:.1f} M parameters, {len(corpus.training) / 1e6:.1f} M tokens, {dist.get_world_size()} ranks")
    checkpoints = output / "checkpoints"
    if not arguments.fresh:
        path, _ = engine.load_checkpoint(checkpoints)
        console.print(f"going on from {path}" if path else "starting anew")
    before = validation_loss(engine, corpus)
    finished = train(engine, corpus, arguments.steps, console)
    engine.save_checkpoint(checkpoints)
    after = validation_loss(engine, corpus)
    states = engine.model_state_bytes()
    console.print(f"validation loss {before:.3f} -> {after:.3f}" + ("" if finished else " (stopped; saved)"))
    console.print(f"model states: {states.total / 1e6:.1f} MB on this rank at stage {engine.zero_optimization_stage()}")
    if first and finished:
        prompt = "def read_file(path):\n"
        engine.eval()
        sample = generate(engine.module, corpus.tokenizer.encode(prompt).ids, 80)
        console.print("a sample:\n" + corpus.tokenizer.decode(sample), markup=False, highlight=False)
    engine.destroy()
    dist.barrier()  # the last rank may still be sampling; none leaves while another could need it


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    # Threads of the gloo backend that still run while the interpreter is torn down can abort a finished process.
    os._exit(0)
