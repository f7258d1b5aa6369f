"""Train a GPT with ZeRO on the source code of Python's standard library, or on any text.

    deepspeed --num_gpus 2 examples/train_lm/train.py --deepspeed_config examples/train_lm/ds_config.json

The same command again goes on from the last checkpoint, whether that run had ended or was stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from data import Corpus, load_corpus
from model import GPT, generate
from options import configuration, fail, parse_options, training_length
from progress import StopRequest, TrainingProgress, mean_over_ranks
from report import History, draw_report, measure_stages, stage_table
from rich.console import Console
from torch import Tensor

import deepspeed
from deepspeed.checkpoint.directory import CheckpointError

VALIDATION_BATCHES = 4
PROMPT = "def read_file(path):\n"


def main() -> None:
    options = parse_options()
    config = configuration(options)
    deepspeed.init_distributed()
    console = Console(quiet=dist.get_rank() != 0)
    corpus = prepare_corpus(options, console)
    engine, *_ = deepspeed.initialize(model=make_model(corpus, options), config=config)
    console.print(describe(engine, corpus))

    history = History() if options.fresh else resume(engine, corpus, options.output)
    length = training_length(config, options)
    goal = engine.global_steps - engine.global_steps % length + length
    started = f"going on from step {engine.global_steps}" if engine.global_steps else "starting anew"
    console.print(f"{started}, to step {goal}; Ctrl-C stops and saves")

    finished = train(engine, corpus, history, goal, options.evaluate_every, console)
    checkpoints = Path(options.output, "checkpoints")
    engine.save_checkpoint(checkpoints, client_state={"text": corpus.key, "history": asdict(history)})
    console.print(f"saved step {engine.global_steps} in {checkpoints}; the same command goes on")
    if not finished:
        raise SystemExit(130)
    show_results(engine, corpus, history, options, console)


def train(
    engine: deepspeed.DeepSpeedEngine, corpus: Corpus, history: History, goal: int, evaluate_every: int, console: Console
) -> bool:
    """Train until step ``goal``; returns False where Ctrl-C came before."""
    with StopRequest() as stop, TrainingProgress(engine, goal, console) as progress:
        if not history.validation:
            evaluate(engine, corpus, history, console)
            progress.resume()
        while engine.global_steps < goal:
            losses = []
            for tokens, targets in micro_batches(engine, corpus):
                loss = engine(tokens, targets)
                engine.backward(loss)
                engine.step()
                losses.append(loss.detach())
            mean = mean_over_ranks(torch.stack(losses).mean())
            history.training.append((engine.global_steps, mean))
            progress.step(mean)
            if engine.global_steps % evaluate_every == 0 or engine.global_steps == goal:
                evaluate(engine, corpus, history, console)
                progress.resume()
            if stop.on_any_rank():
                return False
    return True


def micro_batches(engine: deepspeed.DeepSpeedEngine, corpus: Corpus) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of one optimizer step on this rank. They depend on the step alone, so a resumed run sees the same."""
    for _ in range(engine.gradient_accumulation_steps()):
        seed = 1 + engine.micro_steps * dist.get_world_size() + dist.get_rank()
        size, context = engine.train_micro_batch_size_per_gpu(), engine.module.context
        tokens, targets = corpus.windows(seed=seed, size=size, context=context)
        yield tokens.to(engine.device), targets.to(engine.device)


@torch.no_grad()
def evaluate(engine: deepspeed.DeepSpeedEngine, corpus: Corpus, history: History, console: Console) -> None:
    """Note the mean loss over held-out windows, the same ones each time."""
    size, context = engine.train_micro_batch_size_per_gpu(), engine.module.context
    engine.eval()
    losses = []
    for batch in range(VALIDATION_BATCHES):
        seed = batch * dist.get_world_size() + dist.get_rank()
        tokens, targets = corpus.windows(seed=seed, size=size, context=context, validation=True)
        losses.append(engine(tokens.to(engine.device), targets.to(engine.device)))
    engine.train()
    history.validation.append((engine.global_steps, mean_over_ranks(torch.stack(losses).mean())))
    console.print("step {}: validation loss {:.3f}".format(*history.validation[-1]))


def prepare_corpus(options: argparse.Namespace, console: Console) -> Corpus:
    """The corpus, tokenized by the first rank while the others wait."""
    first = dist.get_rank() == 0
    console.print("reading and tokenizing the text ...")
    if not first:
        dist.barrier()
    cache = Path(options.output, "cache")
    corpus = load_corpus(options.text, vocabulary=options.vocabulary, context=options.context, cache=cache)
    if first:
        dist.barrier()
    return corpus


def make_model(corpus: Corpus, options: argparse.Namespace) -> GPT:
    torch.manual_seed(0)
    vocabulary = corpus.tokenizer.get_vocab_size()
    return GPT(vocabulary=vocabulary, context=options.context, layers=options.layers, width=options.width, heads=options.heads)


def resume(engine: deepspeed.DeepSpeedEngine, corpus: Corpus, output: str) -> History:
    """Load the last checkpoint, if there is one; returns the losses so far."""
    advice = "start anew with --fresh, or keep this run apart with --output"
    checkpoints = Path(output, "checkpoints")
    if not (checkpoints / "latest").exists():
        return History()
    try:
        path, state = engine.load_checkpoint(checkpoints)
    except CheckpointError as error:
        fail(f"cannot go on from the last checkpoint: {error}\n{advice}")
    if state["text"] != corpus.key:
        fail(f"{path} was trained on another text or vocabulary: {advice}")
    return History(**state["history"])


def describe(engine: deepspeed.DeepSpeedEngine, corpus: Corpus) -> str:
    parameters = list(engine.parameters())
    numel = sum(parameter.numel() for parameter in parameters)
    dtype = str(parameters[0].dtype).removeprefix("torch.")
    return (
        f"{numel / 1e6:.1f} M parameters in {dtype}, {len(corpus.training) / 1e6:.1f} M tokens of text, "
        f"{dist.get_world_size()} ranks, ZeRO stage {engine.zero_optimization_stage()}"
    )


def show_results(
    engine: deepspeed.DeepSpeedEngine, corpus: Corpus, history: History, options: argparse.Namespace, console: Console
) -> None:
    (start, before), *_, (end, after) = history.validation
    console.print(f"validation loss {before:.3f} at step {start} -> {after:.3f} at step {end}")
    if dist.get_rank() == 0:
        prompt = options.prompt or (PROMPT if options.text is None else corpus.tokenizer.decode(corpus.validation[:8].tolist()))
        engine.eval()
        sample = generate(engine.module, corpus.tokenizer.encode(prompt).ids, 80)
        console.rule("a sample")
        console.print(corpus.tokenizer.decode(sample), markup=False, highlight=False)
        console.rule()
    config = engine.config
    engine.destroy()
    batch = corpus.windows(seed=0, size=1, context=options.context)
    stages = measure_stages(lambda: make_model(corpus, options), batch, config)
    console.print(stage_table(stages))
    if dist.get_rank() == 0:
        draw_report(history, stages, Path(options.output, "report.png"))
        console.print(f"drawn in {Path(options.output, 'report.png')}")


if __name__ == "__main__":
    main()
