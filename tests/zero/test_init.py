"""Models that are sharded while they are constructed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

import deepspeed
from deepspeed.comm.communicator import Communicator
from deepspeed.zero.construction import ModuleSharder, SharderContext
from tests.parity import sgd, state_of

CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 8},
}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.table = nn.Parameter(torch.randn(5, 6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x)) + self.table.sum(0)


class Model(nn.Module):
    """Initialized again after construction, with a tied weight and a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(6, 6)
        self.blocks = nn.ModuleList([Block() for _ in range(2)])
        self.leave = nn.Linear(6, 6)
        self.leave.weight = self.enter.weight
        self.own = nn.Parameter(torch.randn(4, 6))
        self.apply(self.initialize)

    def initialize(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.5)
            with torch.no_grad():
                module.bias.fill_(0.25)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for block in self.blocks:
            x = block(x)
        return self.leave(x) * self.own.sum(0)


def plain(rank: int = 0) -> Model:
    torch.manual_seed(5 + rank)
    return Model()


def constructed() -> tuple[dict[str, Tensor], list[int], int, bool]:
    rank = torch.distributed.get_rank()
    with deepspeed.zero.Init(config_dict_or_path=CONFIG):
        model = plain(rank)
    sizes = [p.ds_numel for p in model.parameters() if p.ds_status is deepspeed.zero.ZeroParamStatus.AVAILABLE]
    hooks = len(torch_module._global_parameter_registration_hooks) + len(torch_module._global_module_registration_hooks)
    return state_of(model), sizes, hooks, model.leave.weight is model.enter.weight


def test_a_model_has_the_values_of_plain_construction_on_rank_zero(ranks):
    expected = plain().state_dict()
    for state, sizes, hooks, tied in ranks(2, constructed):
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name], value) for name, value in expected.items())
        assert max(sizes) <= 8
        assert (hooks, tied) == (0, True)


def trained(stage: int, init: bool) -> dict[str, Tensor]:
    with deepspeed.zero.Init(config_dict_or_path=CONFIG, enabled=init):
        model = plain()
    config = {**CONFIG, "zero_optimization": {**CONFIG["zero_optimization"], "stage": stage}}
    engine = deepspeed.initialize(model=model, optimizer=sgd(model.parameters()), config=config)[0]
    for step in range(3):
        x = torch.randn(3, 6, generator=torch.Generator().manual_seed(step))
        engine.backward(engine(x).square().mean())
        engine.step()
    return state_of(engine.module)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_it_trains_as_a_model_that_was_constructed_whole(ranks, stage):
    expected = ranks(2, trained, stage, False)[0]
    for state in ranks(2, trained, stage, True):
        assert all(torch.equal(state[name], value) for name, value in expected.items())


def narrow() -> tuple[set[torch.dtype], bool]:
    outer = {**CONFIG, "bf16": {"enabled": True}, "train_batch_size": "auto"}
    with deepspeed.zero.Init(config_dict_or_path=outer):
        with deepspeed.zero.Init(config_dict_or_path=CONFIG):
            first = plain()
        second = plain()
    whole = plain()
    deepspeed.zero.Init(module=whole, dtype=torch.bfloat16, config_dict_or_path=CONFIG)
    states = [state_of(first), state_of(second), state_of(whole)]
    same = all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    return {value.dtype for state in states for value in state.values()}, same


def test_nested_contexts_several_models_and_models_made_before_take_the_configured_dtype(ranks):
    assert ranks(2, narrow) == [({torch.bfloat16}, True)] * 2


REFUSED: list[dict[str, Any]] = [
    {"remote_device": "nvme"},
    {"pin_memory": True},
    {"zero_quantized_weights": True},
    {"zero_quantized_nontrainable_weights": True},
    {"zero_param_parallel_group": "a group"},
    {"param_swapper": "a swapper"},
]


def refused() -> list[str]:
    found = []
    for arguments in REFUSED:
        with pytest.raises(ValueError) as caught:
            deepspeed.zero.Init(config_dict_or_path=CONFIG, **arguments)
        found.append(str(caught.value))
        assert deepspeed.zero.Init(enabled=False, **arguments) is not None
    with pytest.raises(KeyError), deepspeed.zero.Init(config_dict_or_path=CONFIG):
        raise KeyError("the user's")
    assert not torch_module._global_module_registration_hooks
    return found


def test_what_is_not_built_is_refused_and_an_exception_leaves_torch_as_it_was(ranks):
    for nvme, pinned, *others in ranks(2, refused):
        assert "remote_device='nvme'" in nvme and "offload_param.nvme_path" in nvme
        assert "pin_memory=True" in pinned
        for arguments, message in zip(REFUSED[2:], others, strict=True):
            assert next(iter(arguments)) in message and "not built yet" in message


class Grid:
    """A user's ``mpu``."""

    def __init__(self, group: Any):
        self.group = group

    def get_data_parallel_group(self) -> Any:
        return self.group


def grouped() -> list[tuple[int, bool]]:
    rank = torch.distributed.get_rank()
    groups = [torch.distributed.new_group(ranks) for ranks in ([0, 1], [2, 3])]
    mine = groups[rank // 2]
    found = []
    for arguments in ({"data_parallel_group": mine}, {"sequence_data_parallel_group": mine}, {"mpu": Grid(mine)}, {}):
        with deepspeed.zero.Init(config_dict_or_path=CONFIG, **arguments):
            model = plain(rank // 2)
        expected = plain(0 if not arguments else rank // 2).state_dict()
        same = all(torch.equal(value, expected[name]) for name, value in state_of(model).items())
        found.append((model.enter.weight.partition_numel(), same))
    with pytest.raises(ValueError, match="give one"):
        deepspeed.zero.Init(data_parallel_group=mine, sequence_data_parallel_group=mine)
    return found


def test_a_model_is_sharded_over_the_given_group(ranks):
    assert ranks(4, grouped) == [[(18, True), (18, True), (18, True), (9, True)]] * 4


def test_tensors_are_made_on_the_accelerator_in_use(ranks):
    assert ranks(1, placed) == [("meta", "cpu", 0)]


def placed() -> tuple[str, str, int]:
    sharder = ModuleSharder(Communicator(), dtype=None, resident_numel=0, resident_total=0)
    with SharderContext(sharder, [torch.device("meta")]):
        inside = torch.empty(3).device.type
        with pytest.raises(KeyError), SharderContext(sharder):
            raise KeyError
    return inside, torch.empty(3).device.type, len(torch_module._global_module_registration_hooks)
