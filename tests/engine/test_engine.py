from __future__ import annotations

import pytest
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


def saved(directory: str, stage: int) -> dict[str, torch.Tensor]:
    engine = make_engine(stage, **ADAM)
    train(engine, 0, 2)
    engine.save_checkpoint(directory, client_state={"epoch": 7})
    train(engine, 2, 4)
    return {name: value.detach().clone() for name, value in engine.module.state_dict().items()}


def resumed(directory: str, stage: int) -> tuple[dict[str, torch.Tensor], object, int]:
    engine = make_engine(stage, **ADAM)
    path, client_state = engine.load_checkpoint(directory)
    assert path is not None
    train(engine, 2, 4)
    return {n: v.detach().clone() for n, v in engine.module.state_dict().items()}, client_state, engine.global_steps


@pytest.mark.parametrize(("before", "after"), [(2, 2), (2, 0), (0, 1), (1, 2)])
def test_a_checkpoint_resumes_at_another_stage(ranks, tmp_path, before, after):
    expected = ranks(2, saved, str(tmp_path), before)[0]
    for weights, client_state, steps in ranks(2, resumed, str(tmp_path), after):
        assert client_state == {"epoch": 7}
        assert steps == 4
        for name, value in expected.items():
            torch.testing.assert_close(weights[name], value, rtol=1e-6, atol=1e-7)


def loaded_weights(directory: str) -> dict[str, torch.Tensor]:
    engine = make_engine(1, **ADAM)
    engine.load_checkpoint(directory)
    return {name: value.detach().clone() for name, value in engine.module.state_dict().items()}


def test_a_checkpoint_of_two_ranks_loads_on_four_and_one(ranks, tmp_path):
    ranks(2, saved, str(tmp_path), 2)
    one, four = ranks(1, loaded_weights, str(tmp_path)), ranks(4, loaded_weights, str(tmp_path))
    for result in [*one, *four]:
        assert all(torch.equal(value, one[0][name]) for name, value in result.items())


def load_damaged(directory: str) -> tuple[str, bool]:
    engine = make_engine(2, **ADAM)
    before = [p.detach().clone() for p in engine.parameters()]
    with pytest.raises(RuntimeError) as caught:
        engine.load_checkpoint(directory)
    return str(caught.value), all(torch.equal(a, b) for a, b in zip(before, engine.parameters(), strict=True))


def test_a_truncated_checkpoint_is_named_and_leaves_the_engine_as_it_was(ranks, tmp_path):
    ranks(2, saved, str(tmp_path), 2)
    damaged = tmp_path / "global_step2" / "rank_00001.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:100])
    for message, unchanged in ranks(2, load_damaged, str(tmp_path)):
        assert "rank_00001.safetensors is missing or damaged" in message
        assert unchanged


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
