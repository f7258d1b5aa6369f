"""A second copy of the parameters in shards nearby (ZeRO++ hpZ): gathered from all ranks once, from these ranks again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deepspeed
from deepspeed.config import ConfigError, load_config
from deepspeed.utils import safe_set_full_fp32_param
from tests.engine.test_shard_groups import WIDTH, Blocks, Uneven, squares, train, uneven_squares
from tests.parity import Training, assert_close, assert_equal, assert_parity, make_engine, state_of, train_engine

ADAM = {"optimizer": {"type": "AdamW", "params": {"lr": 0.01}}}


def nearby(size: int, zero: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    return {"zero_optimization": {"zero_hpz_partition_size": size, **(zero or {})}, **more}


@pytest.mark.parametrize(("size", "config"), [(4, nearby(2)), (2, nearby(2)), (4, nearby(2, {"enable_sanity_checks": True}))])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_second_copy_trains_as_plain_pytorch(ranks, size, config, accumulation):
    training = Training(Uneven, uneven_squares, steps=4, accumulation=accumulation, config=config)
    assert_parity(ranks, training, size, stages=(3,))


def test_copies_of_shards_may_have_second_copies(ranks):
    config = nearby(2, {"mics_shard_size": 4})
    assert_parity(ranks, Training(Uneven, uneven_squares, steps=3, config=config), 4, stages=(3,))


def test_a_second_copy_in_16_bits_changes_no_bit(ranks):
    def with_size(size: int) -> dict[str, Tensor]:
        config = nearby(size, bf16={"enabled": True}, **ADAM)
        return ranks(4, train_engine, Training(Blocks, in_bf16, steps=3, config=config), 3)[0].weights

    assert_equal(with_size(2), with_size(1))


def in_bf16(model: nn.Module, index: int, backward: Any) -> None:
    x = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(index)).bfloat16()
    backward((model(x).float() - 1).square().mean())


def bytes_and_gathers(config: dict[str, Any], accumulation: int) -> tuple[Any, dict[int, int]]:
    """Of the third step: bytes of the states after it, and how often how many bytes of a gather were sent."""
    config = {**config, "bf16": {"enabled": True}}
    engine = make_engine(Training(Blocks, in_bf16, accumulation=accumulation, config=config), 3)
    for index in range(3 * accumulation):
        if index == 2 * accumulation:
            engine.communicator.log.clear()
        in_bf16(engine, index, engine.backward)
        engine.step()
    gathers: dict[int, int] = {}
    for (kind, message), tally in engine.communicator.log.tallies.items():
        if kind == "all_gather" and message == WIDTH * WIDTH * 2:
            gathers[message] = gathers.get(message, 0) + tally.wire_nbytes
    return engine.model_state_bytes(), gathers


@pytest.mark.parametrize("accumulation", [1, 2])
def test_only_the_first_gather_of_a_step_is_over_all_ranks(ranks, accumulation):
    """Of three blocks forward gathers all, backward the first two again. Over four ranks each sends 3/4 of a block, over two
    1/2. The second copy is half of the 16-bit parameters, masters and gradients stay a quarter."""
    block = WIDTH * WIDTH * 2
    first, again = 3, 2 + 5 * (accumulation - 1)
    plain = ranks(4, bytes_and_gathers, nearby(1), accumulation)
    second = ranks(4, bytes_and_gathers, nearby(2), accumulation)
    for (before, gathers), (after, gathers_nearby) in zip(plain, second, strict=True):
        assert gathers == {block: (first + again) * block * 3 // 4}
        assert gathers_nearby == {block: first * block * 3 // 4 + again * block // 2}
        assert after.parameters - before.parameters == 3 * block // 2
        assert (after.gradients, after.master, after.optimizer) == (before.gradients, before.master, before.optimizer)


def changed_between_forwards(size: int) -> list[Tensor]:
    """Outputs after the parameters were changed in each of the ways there are, without a step between."""
    training = Training(Blocks, squares, config=nearby(size, **ADAM))
    engine = make_engine(training, 3)
    weight = engine.module.blocks[1].weight
    x = torch.ones(2, WIDTH)

    def output() -> Tensor:
        with torch.no_grad():
            return engine(x).clone()

    seen = [output(), output()]
    with deepspeed.zero.GatheredParameters([weight], modifier_rank=0):
        if engine.communicator.rank == 0:
            weight.data.mul_(2)
    seen.append(output())
    safe_set_full_fp32_param(weight, torch.full((WIDTH, WIDTH), 0.01))
    seen.append(output())
    state = state_of(engine.module)
    engine.module.load_state_dict({name: value + 0.01 for name, value in state.items()})
    seen.append(output())
    squares(engine, 0, engine.backward)
    engine.step()
    seen.append(output())
    engine.offload_states()
    engine.reload_states()
    seen.append(output())
    engine.destroy()
    seen += list(state_of(engine.module).values())
    return seen


def test_a_second_copy_is_never_older_than_the_parameters(ranks):
    expected = ranks(4, changed_between_forwards, 1)[0]
    for seen in ranks(4, changed_between_forwards, 2):
        for value, wanted in zip(seen, expected, strict=True):
            assert torch.equal(value, wanted)
    assert len({float(value.sum()) for value in expected[1:6]}) == 5


def saved_and_loaded(directory: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    engine = make_engine(Training(Uneven, uneven_squares, config=nearby(2, **ADAM)), 3)
    train(engine, 0, 2)
    engine.save_checkpoint(directory)
    train(engine, 2, 4)
    expected = state_of(engine.module)
    with torch.no_grad():
        engine(torch.ones(1, 13), True)
    engine.load_checkpoint(directory)
    train(engine, 2, 4)
    return expected, state_of(engine.module)


def test_what_a_checkpoint_brings_is_gathered_anew(ranks, tmp_path):
    for expected, weights in ranks(4, saved_and_loaded, str(tmp_path)):
        assert_close(weights, expected)


def problem(zero: dict[str, Any], world_size: int) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config({"zero_optimization": zero}, world_size=world_size)
    return str(caught.value)


def test_sizes_that_do_not_factor_are_refused_with_the_arithmetic():
    said = problem({"stage": 3, "zero_hpz_partition_size": 4}, 6)
    assert "zero_hpz_partition_size: found 4, which does not divide 6 data-parallel ranks (4 x 1 = 4)" in said
    said = problem({"stage": 3, "zero_hpz_partition_size": 4, "mics_shard_size": 2}, 4)
    assert "found 4, which does not divide 2 ranks of mics_shard_size (4 > 2); set it to 1, 2" in said
    assert "needs stage 3; found stage 2" in problem({"stage": 2, "zero_hpz_partition_size": 2}, 4)
