from __future__ import annotations

import torch
from torch import nn

import deepspeed

STEPS = 3


def make_model() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(16, 33), nn.Tanh(), nn.Linear(33, 16))


def batch(index: int) -> torch.Tensor:
    return torch.randn(4, 16, generator=torch.Generator().manual_seed(index))


def ds_config(stage: int, **more: object) -> dict[str, object]:
    return {
        "train_micro_batch_size_per_gpu": 4,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}},
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 600},
        **more,
    }


def make_engine(stage: int, **more: object) -> deepspeed.DeepSpeedEngine:
    return deepspeed.initialize(model=make_model(), config=ds_config(stage, **more))[0]


def train(engine: deepspeed.DeepSpeedEngine, first: int, last: int) -> None:
    rank, size = engine.communicator.rank, engine.communicator.size
    for index in range(first, last):
        engine.backward(engine(batch(index * size + rank).to(next(engine.parameters()).dtype)).square().mean())
        engine.step()


def weights_after(stage: int, accumulation: int, more: dict[str, object]) -> dict[str, torch.Tensor]:
    engine = make_engine(stage, gradient_accumulation_steps=accumulation, **more)
    train(engine, 0, STEPS * accumulation)
    assert engine.global_steps == STEPS
    return {name: value.detach().clone() for name, value in engine.module.state_dict().items()}


ADAM = {"optimizer": {"type": "AdamW", "params": {"lr": 0.01, "weight_decay": 0.1}}}


def monitored(directory: str) -> None:
    csv = {"csv_monitor": {"enabled": True, "output_path": directory, "job_name": "job"}}
    engine = make_engine(1, **csv)
    train(engine, 0, 2)
    engine.destroy()


def test_the_engine_writes_loss_and_learning_rate_to_its_monitors(ranks, tmp_path):
    ranks(2, monitored, str(tmp_path))
    files = {path.name: path.read_text().splitlines() for path in (tmp_path / "job").iterdir()}
    assert sorted(files) == ["Train_Samples_lr.csv", "Train_Samples_train_loss.csv"]
    assert files["Train_Samples_lr.csv"][1:] == ["8,0.1", "16,0.1"]
