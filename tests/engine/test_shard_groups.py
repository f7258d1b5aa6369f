"""States that are sharded over some of the ranks, with a copy on each group of them (MiCS), train as in plain PyTorch."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deepspeed
from deepspeed.config import ConfigError, load_config
from deepspeed.optim import Lamb, Muon, split_parameter_groups
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
)
from tests.parity import Training, assert_close, assert_parity, generator, make_engine, sgd, state_of, train_plain

WIDTH = 32
ADAM = {"optimizer": {"type": "AdamW", "params": {"lr": 0.01}}}


class Blocks(nn.Module):
    """Three blocks of 1024 elements each."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = torch.tanh(block(x))
        return x


class Uneven(nn.Module):
    """Sizes that do not divide, a frozen block, a small parameter (whole at stage 3), and one that is not always used."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(13, 13) for _ in range(3)])
        self.scale = nn.Parameter(torch.ones(3))
        self.extra = nn.Linear(13, 13)
        self.blocks[0].requires_grad_(False)

    def forward(self, x: Tensor, with_extra: bool) -> Tensor:
        for block in self.blocks:
            x = torch.tanh(block(x))
        return (self.extra(x) if with_extra else x) * self.scale.mean()


def squares(model: nn.Module, index: int, backward: Any) -> None:
    backward((model(torch.randn(2, WIDTH, generator=generator(index))) - 1).square().mean())


def uneven_squares(model: nn.Module, index: int, backward: Any) -> None:
    backward((model(torch.randn(2, 13, generator=generator(index)), index // 4 % 3 == 1) - 1).square().mean())


def mics(size: int, **more: Any) -> dict[str, Any]:
    return {"zero_optimization": {"mics_shard_size": size}, **more}


@pytest.mark.parametrize(("size", "shards"), [(4, 2), (4, 1), (4, 4), (2, 1)])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_copies_of_shards_train_as_plain_pytorch(ranks, size, shards, accumulation):
    config = mics(shards, gradient_clipping=0.1)
    training = Training(Uneven, uneven_squares, steps=4, accumulation=accumulation, config=config)
    # Gloo's all-reduce adds up more than two copies in an order that depends on where in its buffer a value lies.
    same_bits = (1, 2, 3) if size // shards <= 2 else ()
    assert_parity(ranks, training, size, stages=(1, 2, 3), same_bits=same_bits)


def of_all(kind: Any, options: dict[str, object], model: nn.Module) -> torch.optim.Optimizer:
    return kind([p for p in model.parameters() if p.requires_grad], **options)


def muon(model: nn.Module) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    return Muon(split_parameter_groups("Muon", [{"params": trained}]), lr=0.02)


def as_client(plain: Any, model: nn.Module) -> dict[str, Any]:
    return {"optimizer": plain(model)}


@pytest.mark.parametrize("optimizer", [partial(of_all, Lamb, {"lr": 0.01, "weight_decay": 0.5}), muon], ids=["Lamb", "Muon"])
def test_optimizers_of_whole_parameters_step_within_a_copy(ranks, optimizer):
    arguments = partial(as_client, optimizer)
    training = Training(Uneven, uneven_squares, steps=4, config=mics(2), arguments=arguments, optimizer=optimizer)
    assert_parity(ranks, training, 4, tolerance=1e-5, stages=(1, 3))


def test_gradients_may_be_reduced_over_all_ranks_at_once(ranks):
    zero = {"mics_shard_size": 2, "reduce_scatter": False}
    training = Training(Uneven, uneven_squares, config={"zero_optimization": zero})
    assert_parity(ranks, training, 4, stages=(1, 2, 3), same_bits=())


def bytes_and_volumes(stage: int, config: dict[str, Any]) -> tuple[Any, dict[str, int]]:
    config = {"zero_optimization": {"reduce_bucket_size": WIDTH * WIDTH, **config}}
    engine = make_engine(Training(Blocks, squares, config=config), stage)
    for index in range(3):
        if index == 2:
            engine.communicator.log.clear()
        squares(engine, index, engine.backward)
        engine.step()
    volumes: dict[str, int] = {}
    for (kind, message), tally in engine.communicator.log.tallies.items():
        if message >= 2048:  # A slice; agreements are smaller.
            volumes[kind] = volumes.get(kind, 0) + tally.wire_nbytes
    return engine.model_state_bytes(), volumes


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_memory_and_volumes_are_those_of_a_copy_and_the_sum_over_copies(ranks, stage):
    """In units of P, the bytes of all parameters. Of 2 ranks each sends a half. Stage 3 gathers two blocks of three again for
    backward: it keeps the last."""
    total = 3 * WIDTH * WIDTH * 4
    (small, _), _ = ranks(2, bytes_and_volumes, stage, {})
    for measured, volumes in ranks(4, bytes_and_volumes, stage, {"mics_shard_size": 2}):
        assert measured == small
        gathers = {1: 1.0, 2: 1.0, 3: 5 / 3}[stage]
        assert volumes == {
            "reduce_scatter": total / 2,
            "all_reduce": 2 * (total / 2) / 2,
            "all_gather": gathers * total / 2,
        }


TRAINING = Training(Uneven, uneven_squares, config=ADAM)
GROUPS = Training(Uneven, uneven_squares, config=mics(2, **ADAM))


def train(engine: deepspeed.DeepSpeedEngine, first: int, last: int) -> None:
    """The same samples in each step, whatever the number of ranks."""
    rank, size = engine.communicator.rank, engine.communicator.size
    for step in range(first, last):
        x = torch.randn(4, 13, generator=generator(step)).chunk(size)[rank]
        engine.backward((engine(x, step % 2 == 1) - 1).square().mean())
        engine.step()


def saved(training: Training, stage: int, directory: str) -> dict[str, Tensor]:
    engine = make_engine(training, stage)
    train(engine, 0, 3)
    engine.save_checkpoint(directory)
    train(engine, 3, 5)
    return state_of(engine.module)


def resumed(training: Training, stage: int, directory: str) -> dict[str, Tensor]:
    engine = make_engine(training, stage)
    engine.load_checkpoint(directory)
    train(engine, 3, 5)
    return state_of(engine.module)


@pytest.mark.parametrize(
    ("size", "training", "stage"), [(4, TRAINING, 2), (1, TRAINING, 3), (2, TRAINING, 0), (4, GROUPS, 1), (2, GROUPS, 3)]
)
def test_a_checkpoint_of_copies_loads_at_any_layout(ranks, tmp_path, size, training, stage):
    expected = ranks(4, saved, GROUPS, 3, str(tmp_path))[0]
    for weights in ranks(size, resumed, training, stage, str(tmp_path)):
        assert_close(weights, expected, 1e-5)


@pytest.mark.parametrize(("size", "stage"), [(2, 2), (4, 3)])
def test_copies_load_a_checkpoint_of_any_layout(ranks, tmp_path, size, stage):
    expected = ranks(size, saved, TRAINING, stage, str(tmp_path))[0]
    for weights in ranks(4, resumed, GROUPS, 3, str(tmp_path)):
        assert_close(weights, expected, 1e-5)


def looked_at(training: Training, stage: int) -> list[Any]:
    engine = make_engine(training, stage)
    weight = engine.module.blocks[1].weight
    x = torch.randn(1, 13, generator=generator(engine.communicator.rank))
    engine.backward(engine(x, False).square().mean())
    seen: list[Any] = [safe_get_full_grad(weight)]
    engine.step()
    seen += [safe_get_full_optimizer_state(weight, "exp_avg"), safe_get_full_fp32_param(weight)]
    safe_set_full_fp32_param(weight, torch.full((13, 13), 2.0))
    seen.append(state_of(engine.module)["blocks.1.weight"])
    with deepspeed.zero.GatheredParameters([weight], modifier_rank=3):
        if engine.communicator.rank == 3:
            weight.data.fill_(3.0)
    seen.append(safe_get_full_fp32_param(weight))
    engine.destroy()
    seen.append(state_of(engine.module)["blocks.1.weight"])
    return seen


def test_values_behind_a_parameter_are_those_of_one_copy(ranks):
    every = ranks(4, looked_at, GROUPS, 3)
    one = ranks(4, looked_at, TRAINING, 3)[0]
    for seen in every:
        for value, expected in zip(seen, one, strict=True):
            assert torch.allclose(value, expected, rtol=1e-4, atol=1e-7)


def constructed_in_shards() -> dict[str, Tensor]:
    torch.manual_seed(3)
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3, "mics_shard_size": 2}}
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 10  # type: ignore[index]
    with deepspeed.zero.Init(config_dict_or_path=config):
        model = Uneven()
    optimizer = sgd([p for p in model.parameters() if p.requires_grad])
    engine = deepspeed.initialize(model=model, config=config, optimizer=optimizer)[0]
    for step in range(3):
        uneven_squares(engine, step * 4 + engine.communicator.rank, engine.backward)
        engine.step()
    return state_of(engine.module)


def test_a_model_constructed_in_shards_of_all_ranks_moves_into_copies(ranks):
    expected = train_plain(Training(Uneven, uneven_squares), 4).weights
    for weights in ranks(4, constructed_in_shards):
        assert_close(weights, expected)


def problem(size: int, world_size: int, stage: int = 3) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config({"zero_optimization": {"stage": stage, "mics_shard_size": size}}, world_size=world_size)
    return str(caught.value)


def test_sizes_that_do_not_factor_are_refused_with_the_arithmetic():
    said = problem(4, 6)
    assert "zero_optimization.mics_shard_size" in said and "found 4, which does not divide 6 data-parallel ranks" in said
    assert "4 x 1 = 4" in said and "set it to 1, 2, 3, 6" in said
    assert "8 > 2" in problem(8, 2)
    assert "needs stage 1, 2 or 3" in problem(2, 4, stage=0)
    assert "expected -1 or a number of ranks" in problem(0, 4)
