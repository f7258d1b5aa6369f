"""Whole parameters outside their modules: read, changed, loaded."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import deepspeed
from deepspeed.utils import safe_get_full_fp32_param
from tests.parity import Training, make_engine, state_of

BF16 = {"bf16": {"enabled": True}}


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 6), nn.Linear(6, 2).requires_grad_(False))


def loss(engine: nn.Module, index: int, backward) -> None:
    backward(engine(torch.ones(2, 6)).square().mean())


def engine_of(config: dict[str, object] | None = None) -> deepspeed.DeepSpeedEngine:
    return make_engine(Training(model, loss, config=config or {}), 3)


def shapes() -> list[object]:
    module = engine_of().module
    weight, bias = module[0].weight, module[2].bias
    outside = tuple(weight.shape), tuple(bias.shape), weight.ds_status.name, tuple(weight.ds_shape)
    with deepspeed.zero.GatheredParameters({weight, None, bias, torch.ones(3), weight}):
        inside = tuple(weight.shape), weight.ds_status.name
        with deepspeed.zero.GatheredParameters([[weight], (p for p in module.parameters())]):
            nested = tuple(module[2].weight.shape)
        still = tuple(weight.shape)
    return [outside, inside, nested, still, weight.numel()]


def test_a_parameter_is_whole_inside_and_released_outside(ranks):
    for found in ranks(2, shapes):
        assert found == [((0,), (6,), "NOT_AVAILABLE", (9, 6)), ((9, 6), "AVAILABLE"), (6, 9), (9, 6), 0]


def changed(config: dict[str, object]) -> tuple[list[bool], bool]:
    engine = engine_of(config)
    module = engine.module
    rank = engine.communicator.rank
    with deepspeed.zero.GatheredParameters(module, modifier_rank=1):
        for parameter in module.parameters():
            parameter.data.fill_(7.0 if rank == 1 else -1.0)
    sevens = [bool((value == 7).all()) for value in state_of(module).values()]
    masters = [safe_get_full_fp32_param(p) for p in module.parameters() if p.requires_grad]
    sevens += [bool((master == 7).all()) for master in masters]
    with deepspeed.zero.GatheredParameters(module[0].weight):
        module[0].weight.data.fill_(3.0)
    return sevens, bool((state_of(module)["0.weight"] == 7).all())


@pytest.mark.parametrize("config", [{}, BF16], ids=["fp32", "bf16"])
def test_what_the_modifier_rank_wrote_is_everyone_s_and_the_masters_and_other_changes_are_lost(ranks, config):
    for sevens, kept in ranks(2, changed, config):
        assert all(sevens)
        assert len(sevens) == 10
        assert kept


ALL_SMALL = {"zero_optimization": {"stage3_param_persistence_threshold": 1000}}


def written_small(config: dict[str, object]) -> tuple[list[bool], bool]:
    engine = engine_of({**config, **ALL_SMALL})
    module = engine.module
    rank = engine.communicator.rank
    with deepspeed.zero.GatheredParameters(module, modifier_rank=1):
        for parameter in module.parameters():
            parameter.data.fill_(7.0 if rank == 1 else -1.0)
    masters = [safe_get_full_fp32_param(p) for p in module.parameters() if p.requires_grad]
    described = all(p.ds_status.name == "AVAILABLE" and p.ds_shape == p.shape for p in module.parameters())
    return [bool((value == 7).all()) for value in [*state_of(module).values(), *masters]], described


@pytest.mark.parametrize("config", [{}, BF16], ids=["fp32", "bf16"])
def test_so_it_is_where_all_parameters_are_so_small_that_none_is_sharded(ranks, config):
    for sevens, described in ranks(2, written_small, config):
        assert sevens == [True] * 10 and described


def after_an_error() -> tuple[bool, int]:
    module = engine_of().module
    before = state_of(module)
    with pytest.raises(KeyError), deepspeed.zero.GatheredParameters(module, modifier_rank=0):
        module[0].weight.data.zero_()
        raise KeyError("the user's")
    after = state_of(module)
    return torch.equal(after["0.weight"], before["0.weight"]), module[0].weight.numel()


def test_an_exception_inside_leaves_sharded_parameters_as_they_were(ranks):
    assert ranks(2, after_an_error) == [(True, 0)] * 2


def misused() -> tuple[str, str]:
    module = engine_of().module
    with pytest.raises(RuntimeError) as outside:
        module[0].weight.sum()
    with pytest.raises(RuntimeError) as copied:
        copy.deepcopy(module)
    return str(outside.value), str(copied.value)


def test_computing_with_a_released_parameter_is_an_error_that_says_what_to_do(ranks):
    for outside, copied in ranks(2, misused):
        assert "'0.weight' (9, 6) is sharded by ZeRO stage 3 and was used (sum)" in outside
        assert "GatheredParameters" in outside
        assert "'0.weight' (9, 6) is sharded by ZeRO stage 3 and was used (deepcopy)" in copied


def loaded() -> tuple[dict[str, Tensor], list[Tensor], int, str]:
    engine = engine_of(BF16)
    torch.manual_seed(11)
    whole = model().state_dict()
    engine.module.load_state_dict(whole)
    masters = [safe_get_full_fp32_param(p) for p in engine.module.parameters() if p.requires_grad]
    wrong = {name: value.t() for name, value in whole.items()}
    with pytest.raises(RuntimeError) as refused:
        engine.module.load_state_dict(wrong)
    return state_of(engine.module), masters, engine.module[0].weight.numel(), str(refused.value)


def test_a_whole_state_dict_is_loaded_into_the_shards(ranks):
    torch.manual_seed(11)
    expected = {name: value.bfloat16() for name, value in model().state_dict().items()}
    for state, masters, released, refused in ranks(2, loaded):
        assert [name for name, value in expected.items() if not torch.equal(state[name], value)] == []
        assert all(torch.equal(m, expected[name].float()) for m, name in zip(masters, expected, strict=False))
        assert released == 0
        assert "size mismatch for 0.weight" in refused


def plain_things() -> list[object]:
    """Whatever is no sharded parameter is passed over, before there is an engine and at a stage that shards none."""
    module = model()
    with deepspeed.zero.GatheredParameters(module.parameters(), modifier_rank=0):
        before = tuple(module[0].weight.shape)
    for given in (None, [], [None, [torch.ones(2)]], module[0].bias, {"a": module[0].weight}, iter(())):
        with deepspeed.zero.GatheredParameters(given, modifier_rank=0):
            pass
    engine = make_engine(Training(model, loss), 2)
    with deepspeed.zero.GatheredParameters(engine.module, modifier_rank=0):
        stage_two = tuple(engine.module[0].weight.shape)
    sharded = engine_of().module
    with deepspeed.zero.GatheredParameters(sharded.parameters(), enabled=False):
        disabled = sharded[0].weight.numel()
    return [before, stage_two, disabled]


def test_what_is_not_sharded_is_passed_over(ranks):
    assert ranks(2, plain_things) == [[(9, 6), (9, 6), 0]] * 2


class Reading(nn.Module):
    """Computes with another module's weight, through a name that it has no part in."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Linear(6, 6)
        self.user = nn.Linear(6, 6)
        self.user.register_forward_hook(lambda module, args, output: output + args[0] @ self.table.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.user(x)


def declared(forward_module: bool) -> list[str]:
    """The units that are held while a module runs, from the first forward on."""
    engine = make_engine(Training(Reading, loss), 3)
    table, user = engine.module.table, engine.module.user
    with deepspeed.zero.GatheredParameters(table.weight, modifier_rank=0, fwd_module=user if forward_module else None):
        table.weight.data.fill_(1.0)
    held: list[str] = []
    user.register_forward_pre_hook(lambda *_: held.extend(u.name for u in engine.sharded_model.scopes.fetcher.units if u.holds))
    loss(engine, 0, engine.backward)
    engine.step()
    return held


def test_a_forward_module_has_the_parameters_too_from_then_on(ranks):
    assert ranks(2, declared, True) == [["table", "user"]] * 2
    assert ranks(2, declared, False) == [["user"]] * 2


def nested_changes() -> tuple[bool, bool, int]:
    """An inner context of another modifier inside one that reads; then the outer one ends."""
    engine = engine_of(BF16)
    module, rank = engine.module, engine.communicator.rank
    weight = module[0].weight
    with deepspeed.zero.GatheredParameters(module):
        with deepspeed.zero.GatheredParameters([weight], modifier_rank=1):
            weight.data.fill_(float(rank))
        inside = bool((weight == 1).all())
    return inside, bool((safe_get_full_fp32_param(weight) == 1).all()), weight.numel()


def test_changes_of_an_inner_context_are_kept(ranks):
    assert ranks(2, nested_changes) == [(True, True, 0)] * 2


def changed_between_steps(stage: int) -> dict[str, Tensor]:
    """Weights and biases, sharded and resident ones, scaled on rank 0 between two steps."""
    engine = make_engine(Training(model, loss), stage)
    for index in range(3):
        loss(engine, index, engine.backward)
        engine.step()
        with deepspeed.zero.GatheredParameters(engine.module.parameters(), modifier_rank=0), torch.no_grad():
            for parameter in engine.module.parameters():
                parameter.mul_(0.5)
        if stage < 3:
            for bucket in engine.optimizer.flat.layout.buckets:
                assert not engine.optimizer.flat.has_separate_master(bucket)
    return state_of(engine.module)


def test_training_goes_on_from_changes(ranks):
    expected = ranks(1, changed_between_steps, 2)[0]
    for state in ranks(2, changed_between_steps, 3):
        for name, value in expected.items():
            assert torch.allclose(state[name], value, rtol=1e-6)


def while_in_use() -> str:
    """Contexts around forward and backward do not take away what modules hold."""
    engine = engine_of()
    weight = engine.module[0].weight
    with deepspeed.zero.GatheredParameters(weight):
        result = engine(torch.ones(2, 6)).square().mean()
        assert weight.numel() == 54
        engine.backward(result)
        assert weight.numel() == 54
    engine.step()
    return weight.ds_status.name


def test_a_parameter_stays_whole_while_a_context_holds_it(ranks):
    assert ranks(2, while_in_use) == ["NOT_AVAILABLE"] * 2


def shown_as_arrays() -> list[float]:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    expected = model[0].weight.detach().clone()
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "SGD", "params": {"lr": 0.01}},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }
    engine = deepspeed.initialize(model=model, config=config)[0]
    with deepspeed.zero.GatheredParameters(model[0].weight):
        array = model[0].weight.detach().numpy()
    losses = []
    for _ in range(2):
        loss = engine(torch.ones(1, 8)).square().sum()
        losses.append(float(loss.detach()))
        engine.backward(loss)
        engine.step()
    assert torch.equal(torch.from_numpy(array), expected)
    return losses


def test_an_array_of_a_gathered_parameter_keeps_its_values_and_training_goes_on(ranks):
    for before, after in ranks(2, shown_as_arrays):
        assert after < before
