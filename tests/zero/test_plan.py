from __future__ import annotations

from torch import nn

from deepspeed.zero.leaves import leaf_predicate, set_z3_leaf_module
from deepspeed.zero.plan import UnitLimits, UnitPlan, plan_units


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.experts = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, 4)
        self.blocks = nn.ModuleList([Block() for _ in range(2)])
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 8, bias=False)
        self.head.weight = self.embedding.weight


def plan(
    model: nn.Module, *, resident: int = 0, total: int = 10**9, largest: int = 10**9, leaves: tuple[str, ...] = ()
) -> UnitPlan:
    limits = UnitLimits(resident, total, largest, leaf_predicate((), leaves, ()))
    return plan_units(model, nn.Parameter.numel, limits)


def test_blocks_are_units_and_so_is_each_module_outside_them():
    found = plan(Model())
    assert found.names == ("embedding", "blocks.0", "blocks.1", "norm")
    assert {name: found.names[unit] for name, unit in found.unit_of.items()}["blocks.1.experts.2.weight"] == "blocks.1"


def test_a_tied_parameter_is_needed_by_both_of_its_modules():
    found = plan(Model())
    assert found.needs["head"] == found.needs["embedding"] == (0,)


def test_small_parameters_stay_whole_until_they_are_many():
    assert set(plan(Model(), resident=4).unit_of) == {n for n, p in Model().named_parameters() if p.numel() > 4}
    assert "norm.weight" in plan(Model(), resident=4, total=8).unit_of


def test_a_block_that_is_too_large_is_cut_into_what_is_inside():
    found = plan(Model(), largest=40)
    assert "blocks.0.experts.1" in found.names
    assert "blocks.0.inner" in found.names


def test_a_leaf_is_one_unit():
    assert plan(Model(), leaves=("",)).names == ("",)
    model = Model()
    set_z3_leaf_module(model.blocks[0].experts, True)
    assert plan(model, largest=40).names[1:3] == ("blocks.0.inner", "blocks.0.experts")
