"""Checkpoints of torch.distributed.checkpoint, of a model that FSDP shards."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import deepspeed
from deepspeed.checkpoint.directory import CheckpointError
from deepspeed.checkpoint.opening import open_source
from tests.parity import assert_close, generator, state_of

WIDTH = 5


def make_model() -> nn.Module:
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(WIDTH, 7), nn.Tanh(), nn.Linear(7, WIDTH))


def step(model: nn.Module, index: int, backward: object) -> None:
    x = torch.randn(4, WIDTH, generator=generator(index)).chunk(dist.get_world_size())[dist.get_rank()]
    backward(model(x).square().mean())


def saved(directory: str) -> dict[str, Tensor]:
    model = make_model()
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    for index in range(4):
        if index == 2:
            weights, states = get_state_dict(model, optimizer)
            dcp.save({"model": weights}, checkpoint_id=f"{directory}/pytorch_model_fsdp_0")
            dcp.save({"optimizer": states}, checkpoint_id=f"{directory}/optimizer_0")
        step(model, index, Tensor.backward)
        optimizer.step()
        optimizer.zero_grad()
    return {name: value.full_tensor().detach() for name, value in model.state_dict().items()}


def resumed(directory: str) -> dict[str, Tensor]:
    config = {
        "train_micro_batch_size_per_gpu": 4 // dist.get_world_size(),
        "optimizer": {"type": "AdamW", "params": {"lr": 0.02, "torch_adam": True}},
        "zero_optimization": {"stage": 3},
    }
    engine = deepspeed.initialize(model=make_model(), config=config)[0]
    engine.load_checkpoint(Path(directory).parent, tag=Path(directory).name)
    for index in (2, 3):
        step(engine, index, engine.backward)
        engine.step()
    return state_of(engine.module)


def test_training_goes_on_from_shards_of_accelerate_and_fsdp(ranks, tmp_path):
    expected = ranks(2, saved, str(tmp_path))[0]
    for size in (1, 2):
        assert_close(ranks(size, resumed, str(tmp_path))[0], expected, 1e-5)


class Harmful:
    def __reduce__(self) -> tuple[object, ...]:
        return eval, ("1/0",)


def test_metadata_of_other_things_than_data_is_refused(tmp_path):
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Harmful()))
    with pytest.raises(CheckpointError, match=r"\.metadata.*eval is not allowed"):
        open_source(tmp_path)
