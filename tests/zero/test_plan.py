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
    model: nn.Module,
    *,
    resident: int = 0,
    total: int = 10**9,
    largest: int = 10**9,
    leaves: tuple[str, ...] = (),
    granularity: int = 0,
) -> UnitPlan:
    limits = UnitLimits(resident, total, largest, leaf_predicate((), leaves, ()), granularity)
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


def test_a_module_of_few_parameters_per_module_in_it_is_one_unit():
    # 80 elements in the 6 modules of a block, 60 in the 4 of its experts, 200 in the 17 of the model.
    assert plan(Model(), largest=40, granularity=15).names == plan(Model(), largest=40, leaves=("",)).names
    assert plan(Model(), largest=40, granularity=11).names == plan(Model(), largest=40).names
    found = plan(nn.Sequential(Model(), nn.Linear(40, 40)), largest=40, granularity=14)
    assert found.names == ("0", "1")


def test_modules_need_their_own_parameters_and_blocks_all_that_is_inside():
    found = plan(Model())
    needs = {name: [found.names[unit] for unit in units] for name, units in found.needs.items()}
    assert needs[""] == needs["blocks"] == []
    assert needs["blocks.1"] == needs["blocks.1.inner"] == needs["blocks.1.experts.2"] == ["blocks.1"]
    assert needs["blocks.1.experts"] == []


def test_a_parameter_of_two_blocks_belongs_to_the_first_and_is_needed_by_both():
    model = Model()
    model.blocks[1].inner.weight = model.blocks[0].inner.weight
    found = plan(model)
    assert found.names[found.unit_of["blocks.0.inner.weight"]] == "blocks.0"
    assert [found.names[unit] for unit in found.needs["blocks.1"]] == ["blocks.0", "blocks.1"]


def test_parameters_without_elements_stay_whole():
    model = nn.Sequential(nn.Linear(4, 4, bias=False))
    model.register_parameter("nothing", nn.Parameter(model[0].weight.detach()[:0]))
    assert list(plan(model).unit_of) == ["0.weight"]
