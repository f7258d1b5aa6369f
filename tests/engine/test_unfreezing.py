"""Parameters frozen at ``initialize`` and unfrozen later, and the other way: as plain PyTorch trains them."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deepspeed
from deepspeed.optim import Lamb, Muon, split_parameter_groups
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from tests.parity import Training, assert_close, assert_parity, generator, make_engine, sgd, state_of

WIDTH = 12


class Staged(nn.Module):
    """Blocks of which all but the last are frozen at first."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(3)])
        self.blocks[:2].requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = torch.tanh(block(x))
        return x


def squared_output(model: nn.Module, index: int, backward) -> None:
    backward(model(torch.randn(4, WIDTH, generator=generator(index))).square().mean())


def block_by_block(model: nn.Module, index: int, backward) -> None:
    """With two ranks: block 1 joins at the third micro-step, block 0 at the fifth."""
    if index >= 4:
        model.blocks[1].requires_grad_(True)
    if index >= 8:
        model.blocks[0].requires_grad_(True)
    squared_output(model, index, backward)


def back_and_forth(model: nn.Module, index: int, backward) -> None:
    """With two ranks: block 1 joins at the second micro-step and rests at the fourth, where block 2 does for two."""
    model.blocks[1].requires_grad_(index >= 2 and index // 2 != 3)
    model.blocks[2].requires_grad_(index // 2 not in (3, 4))
    model.blocks[0].requires_grad_(index >= 6)
    squared_output(model, index, backward)


def on_rank_one_alone(model: nn.Module, index: int, backward) -> None:
    """With two ranks: block 0 joins at the third micro-step on rank 1."""
    model.blocks[0].requires_grad_(index >= 4 and index % 2 == 1)
    squared_output(model, index, backward)


def of_all(kind: Any, options: dict[str, object], model: nn.Module) -> torch.optim.Optimizer:
    return kind(model.parameters(), **options)


def sgd_of_all(model: nn.Module) -> torch.optim.Optimizer:
    return sgd(model.parameters())


def muon(model: nn.Module) -> torch.optim.Optimizer:
    return Muon(split_parameter_groups("Muon", [{"params": list(model.parameters())}]), lr=0.02)


def in_groups(model: nn.Module) -> torch.optim.Optimizer:
    """The second group is frozen at first."""
    first, second = [model.blocks[0].weight, model.blocks[2].weight, model.blocks[2].bias], model.blocks[1].parameters()
    return sgd([{"params": first}, {"params": second, "lr": 0.01, "momentum": 0.5}])


def as_client(plain: Any, model: nn.Module) -> dict[str, Any]:
    return {"optimizer": plain(model)}


@pytest.mark.parametrize("micro_step", [block_by_block, back_and_forth, on_rank_one_alone])
@pytest.mark.parametrize("accumulation", [1, 2, 3])
def test_what_is_unfrozen_is_trained_from_then_on(ranks, micro_step, accumulation):
    """With accumulation, in the midst of a step too. At stage 3 all ranks run the same backward: they fetch together."""
    config = {"gradient_clipping": 0.1}
    training = Training(
        Staged, micro_step, steps=8 // accumulation + 1, accumulation=accumulation, config=config, optimizer=sgd_of_all
    )
    assert_parity(ranks, training, stages=(0, 1, 2) if micro_step is on_rank_one_alone else (0, 1, 2, 3))


@pytest.mark.parametrize(
    "optimizer",
    [
        partial(of_all, torch.optim.AdamW, {"lr": 0.01}),
        partial(of_all, torch.optim.Adagrad, {"lr": 0.01, "lr_decay": 0.5}),
        partial(of_all, Lamb, {"lr": 0.01, "weight_decay": 0.5}),
        muon,
        in_groups,
    ],
    ids=["AdamW", "Adagrad", "Lamb", "Muon", "in groups"],
)
@pytest.mark.parametrize("bucket", [100, 10_000])
def test_each_optimizer_takes_in_what_is_unfrozen(ranks, optimizer, bucket):
    training = Training(
        Staged,
        block_by_block,
        steps=6,
        config={"zero_optimization": {"reduce_bucket_size": bucket}},
        arguments=partial(as_client, optimizer),
        optimizer=optimizer,
    )
    assert_parity(ranks, training, stages=(0, 1, 2, 3), tolerance=1e-5)


def held_while_it_steps(stage: int) -> bool:
    """Unfrozen inside ``GatheredParameters``: whole before and after the step, with the values of the step afterwards."""
    results = []
    for gathered in (False, True):
        engine = make_engine(Training(Staged, squared_output), stage)
        engine.module.blocks[:2].requires_grad_(True)
        with deepspeed.zero.GatheredParameters(engine.module, enabled=gathered):
            squared_output(engine, 0, engine.backward)
            engine.step()
        squared_output(engine, 1, engine.backward)
        engine.step()
        results.append(state_of(engine.module))
        engine.destroy()
    return all(torch.equal(value, results[1][name]) for name, value in results[0].items())


def test_what_is_gathered_may_be_unfrozen(ranks):
    assert ranks(2, held_while_it_steps, 3) == [True, True]


@pytest.mark.parametrize("zero", [{"zero_hpz_partition_size": 2}, {"mics_shard_size": 2}], ids=["second copy", "copies"])
def test_what_is_unfrozen_stays_in_its_unit_in_any_groups(ranks, zero):
    """With four ranks all blocks have joined at the third step."""
    training = Training(Staged, block_by_block, steps=5, config={"zero_optimization": zero}, optimizer=sgd_of_all)
    assert_parity(ranks, training, 4, stages=(3,))


def looked_at(stage: int) -> list[object]:
    config = {"optimizer": {"type": "AdamW", "params": {"lr": 0.01}}, "bf16": {"enabled": True}}
    engine = make_engine(Training(Staged, squared_output, config=config), stage)
    weight = engine.module.blocks[0].weight
    seen: list[object] = [safe_get_full_fp32_param(weight)]
    before = engine.model_state_bytes()
    for _ in range(2):
        engine.module.blocks[0].requires_grad_(True)
        engine.backward(engine(torch.ones(2, WIDTH, dtype=torch.bfloat16)).float().sum())
        engine.step()
        seen.append(float(safe_get_full_optimizer_state(weight, "step")))
    after = engine.model_state_bytes()
    with deepspeed.zero.GatheredParameters([weight]):
        seen.append(torch.equal(weight, safe_get_full_fp32_param(weight).bfloat16()))
    seen.append(weight.grad is None and after.master == 2 * before.master)
    return seen


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_an_unfrozen_parameter_has_a_master_and_states(ranks, stage):
    for seen in ranks(2, looked_at, stage):
        assert seen == [None, 1.0, 2.0, True, True]


ADAM = Training(Staged, squared_output, config={"optimizer": {"type": "AdamW", "params": {"lr": 0.01}}})


def train(engine, first: int, last: int, unfrozen: int) -> None:
    """The same samples in each step, whatever the number of ranks, with the last ``unfrozen`` blocks trained."""
    engine.module.blocks[3 - unfrozen :].requires_grad_(True)
    rank, size = engine.communicator.rank, engine.communicator.size
    for step in range(first, last):
        x = torch.randn(4, WIDTH, generator=generator(step)).chunk(size)[rank]
        engine.backward(engine(x).square().mean())
        engine.step()


def saved(directory: str, stage: int) -> list[dict[str, Tensor]]:
    engine = make_engine(ADAM, stage)
    train(engine, 0, 1, unfrozen=1)
    train(engine, 1, 3, unfrozen=2)
    engine.save_checkpoint(directory)
    results = []
    for unfrozen in (2, 3):
        train(engine, 3, 5, unfrozen)
        results.append(state_of(engine.module))
        engine.load_checkpoint(directory)
    return results


def resumed(directory: str, stage: int) -> list[dict[str, Tensor]]:
    """Once in an engine that has block 1 still frozen, once in one that has unfrozen block 0 already."""
    results = []
    for unfrozen in (2, 3):
        engine = make_engine(ADAM, stage)
        if unfrozen == 3:
            train(engine, 10, 11, unfrozen)
        engine.load_checkpoint(directory)
        train(engine, 3, 5, unfrozen)
        results.append(state_of(engine.module))
        engine.destroy()
    return results


@pytest.mark.parametrize(("size", "stage"), [(1, 0), (2, 1), (2, 2), (4, 2), (2, 3), (4, 3)])
@pytest.mark.parametrize("before", [2, 3])
def test_a_checkpoint_goes_on_with_the_states_of_what_was_unfrozen(ranks, tmp_path, before, size, stage):
    expected = ranks(2, saved, str(tmp_path), before)[0]
    for results in ranks(size, resumed, str(tmp_path), stage):
        for weights, wanted in zip(results, expected, strict=True):
            assert_close(weights, wanted, 1e-5)


def in_part(directory: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weight of block 0 joins, its bias stays frozen: the slice in which both were has a gap."""
    engine = make_engine(ADAM, 3)

    def trained(first: int, last: int) -> dict[str, Tensor]:
        engine.module.blocks[0].weight.requires_grad_(True)
        for step in range(first, last):
            squared_output(engine, 2 * step + engine.communicator.rank, engine.backward)
            engine.step()
        return state_of(engine.module)

    trained(0, 2)
    with deepspeed.zero.GatheredParameters([engine.module.blocks[0].bias], modifier_rank=0):
        engine.module.blocks[0].bias.data.fill_(0.5)
    engine.save_checkpoint(directory)
    expected = trained(2, 4)
    engine.destroy()
    engine = make_engine(ADAM, 3)
    engine.load_checkpoint(directory)
    return expected, trained(2, 4)


def test_a_part_of_a_unit_may_be_unfrozen(ranks, tmp_path):
    for expected, weights in ranks(2, in_part, str(tmp_path)):
        assert_close(weights, expected)
        assert torch.equal(weights["blocks.0.bias"], torch.full((WIDTH,), 0.5))


def last_block_alone(model: nn.Module) -> dict[str, Any]:
    return {"model_parameters": model.blocks[2].parameters()}


def unfrozen_in_no_group() -> tuple[list[str], bool]:
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("DeepSpeed")
    logger.addHandler(handler)
    try:
        engine = make_engine(Training(Staged, squared_output, arguments=last_block_alone), 2)
        before = engine.module.blocks[0].weight.clone()
        engine.module.blocks[0].requires_grad_(True)
        for index in range(3):
            squared_output(engine, index, engine.backward)
            engine.step()
    finally:
        logger.removeHandler(handler)
    return [line for line in said if "not trained" in line], torch.equal(before, engine.module.blocks[0].weight)


def test_what_is_unfrozen_but_in_no_group_is_left_alone_and_named_once(ranks):
    (said, same), (other, same_there) = ranks(2, unfrozen_in_no_group)
    assert same and same_there and other == []
    assert len(said) == 1 and "blocks.0.weight, blocks.0.bias" in said[0]


def forgotten(stage: int) -> tuple[bool, float, int]:
    """``zero_grad`` takes a waiting gradient too, and a skipped step leaves nothing behind."""
    config = {"fp16": {"enabled": True, "hysteresis": 1, "initial_scale_power": 4}}
    engine = make_engine(Training(Staged, squared_output, config=config), stage)
    before = state_of(engine.module)
    engine.module.blocks[0].requires_grad_(True)
    x = torch.ones(2, WIDTH, dtype=torch.float16)
    engine.backward(engine(x).float().sum())
    engine.optimizer.zero_grad()
    engine.backward((engine(x).float() * float("inf")).sum())
    engine.step()
    same = all(torch.equal(value, before[name]) for name, value in state_of(engine.module).items())
    return same, engine.loss_scale(), engine.skipped_steps


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_waiting_gradient_is_forgotten_with_the_others(ranks, stage):
    assert ranks(2, forgotten, stage) == [(True, 8.0, 1)] * 2


def differs(stage: int) -> str:
    """Rank 1 unfreezes one block after a step of all; once all have, training goes on."""
    engine = make_engine(Training(Staged, squared_output), stage)
    squared_output(engine, 0, engine.backward)
    engine.step()
    if torch.distributed.get_rank() == 1:
        engine.module.blocks[1].requires_grad_(True)
    with pytest.raises(RuntimeError) as caught:
        squared_output(engine, 1, engine.backward)
    engine.module.blocks[1].requires_grad_(True)
    squared_output(engine, 1, engine.backward)
    engine.step()
    return str(caught.value)


def test_unfreezing_on_some_ranks_alone_is_an_error_at_stage_three_that_names_parameter_and_ranks(ranks):
    for message in ranks(3, differs, 3):
        assert "'blocks.1.weight' and 1 more are trained on some ranks" in message
        assert "requires_grad on rank 1, and not on ranks 0, 2" in message
