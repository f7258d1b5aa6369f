"""Accelerate's own loop over an engine, against the same loop in plain PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator, DeepSpeedPlugin, PartialState
from accelerate.utils import DummyOptim, DummyScheduler
from torch import Tensor, nn

from deepspeed import DeepSpeedEngine

from .common import assert_same, each_stage, each_stage_and_world, isolated, weights
from .loop import (
    ACCUMULATION,
    BATCH,
    CLIP,
    LR,
    STEPS,
    TOLERANCE,
    make_accelerator,
    perceptron,
    plain,
    samples,
    schedule,
    sgd,
    train,
)


@isolated
def accelerated(stage: int) -> dict[str, Any]:
    accelerator = make_accelerator(stage)
    given = perceptron()
    optimizer = sgd(given)
    model, optimizer, loader, scheduler = accelerator.prepare(given, optimizer, samples(BATCH), schedule(optimizer))
    train(accelerator, model, optimizer, loader, scheduler)
    state = accelerator.get_state_dict(model)
    norm = accelerator.deepspeed_engine_wrapped.get_global_grad_norm()
    return {
        "weights": weights(given),
        "state": state,
        "engine": type(model) is DeepSpeedEngine,
        "unwrapped": accelerator.unwrap_model(model) is given,
        "norm": isinstance(norm, float) and norm > 0,
        "skipped": accelerator.optimizer_step_was_skipped,
        "steps": model.global_steps,
        "rate": (scheduler.get_last_lr(), model.get_lr()),
    }


@each_stage_and_world
def test_a_loop_with_accumulation_clipping_and_a_schedule_trains_to_the_numbers_of_plain_pytorch(ranks, stage, world):
    # Accelerate steps a schedule once for each rank, as if the ranks trained one after another.
    expected = plain(world, decay=world)
    for rank, result in enumerate(ranks(world, accelerated, stage)):
        assert_same(result["weights"], expected, TOLERANCE)
        if rank == 0:
            assert_same(result["state"], result["weights"])
        assert result["engine"] and result["unwrapped"] and result["norm"] and not result["skipped"]
        assert result["steps"] == STEPS * 2 // world
        assert result["rate"][0] == result["rate"][1] == [LR / (1 + STEPS * 2)]


@isolated
def configured(stage: int) -> tuple[dict[str, Tensor], list[float]]:
    """Optimizer and schedule from the configuration, with what the script's placeholders know."""
    PartialState(cpu=True)
    config = {
        "zero_optimization": {"stage": stage},
        "gradient_clipping": CLIP,
        "gradient_accumulation_steps": ACCUMULATION,
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto"}},
        "scheduler": {
            "type": "WarmupDecayLR",
            "params": {
                "warmup_min_lr": "auto",
                "warmup_max_lr": "auto",
                "warmup_num_steps": "auto",
                "total_num_steps": "auto",
                "warmup_type": "linear",
            },
        },
    }
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config))
    model = perceptron()
    optimizer = DummyOptim(model.parameters(), lr=LR, weight_decay=0.01)
    scheduler = DummyScheduler(optimizer, total_num_steps=2 * STEPS, warmup_num_steps=2)
    engine, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, samples(BATCH), scheduler)
    train(accelerator, engine, optimizer, loader, scheduler)
    return weights(model), engine.get_lr()


@each_stage
def test_optimizer_and_schedule_may_come_from_the_configuration(ranks, stage):
    model = perceptron()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.01)
    rates = [0.0, 0.5, 1.0, 0.5, 0.0]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rates[step])
    for index, (x, y) in enumerate(samples(BATCH * 2)):
        (nn.functional.mse_loss(model(x), y) / ACCUMULATION).backward()
        if (index + 1) % ACCUMULATION == 0:
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
    for result, rate in ranks(2, configured, stage):
        assert_same(result, weights(model), 1e-5)
        assert rate == [0.0]


def prepared(stage: int, seed: int = 3) -> tuple[Accelerator, nn.Module, Any]:
    """An accelerator, its engine, and a function that trains for ``STEPS`` steps."""
    accelerator = make_accelerator(stage)
    model = perceptron(seed)
    optimizer = sgd(model)
    engine, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, samples(BATCH), schedule(optimizer))
    return accelerator, engine, lambda: train(accelerator, engine, optimizer, loader, scheduler)


def standing(engine: Any) -> dict[str, Tensor]:
    numbers = {"rate": torch.tensor(engine.get_lr()), "steps": torch.tensor(engine.global_steps)}
    return {**weights(engine.module), **numbers}


@isolated
def saved(folder: str, stage: int) -> dict[str, Tensor]:
    accelerator, engine, go_on = prepared(stage)
    go_on()
    accelerator.save_state(folder)
    go_on()
    return standing(engine)


@isolated
def loaded(folder: str, stage: int) -> dict[str, Tensor]:
    accelerator, engine, go_on = prepared(stage, seed=9)
    accelerator.load_state(folder)
    go_on()
    return standing(engine)


@each_stage
def test_a_training_goes_on_from_a_saved_state_to_the_same_bits(ranks, tmp_path, stage):
    whole = ranks(2, saved, str(tmp_path), stage)
    assert (tmp_path / "latest").read_text() == "pytorch_model" and (tmp_path / "pytorch_model").is_dir()
    for rank, resumed in enumerate(ranks(2, loaded, str(tmp_path), stage)):
        assert resumed["steps"] == 2 * STEPS
        assert_same(resumed, whole[rank])
