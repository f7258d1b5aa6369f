from __future__ import annotations

import pytest
from torch import nn

from deepspeed.utils import (
    get_z3_leaf_modules,
    set_z3_leaf_modules,
    set_z3_leaf_modules_by_name,
    set_z3_leaf_modules_by_suffix,
    unset_z3_leaf_modules,
    z3_leaf_module,
)
from deepspeed.zero.leaves import leaf_predicate


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(2, 2)


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2), Expert(), Expert())


@pytest.mark.parametrize(
    ("mark", "given", "positions"),
    [
        (set_z3_leaf_modules, [Expert], [1, 2]),
        (set_z3_leaf_modules, ["Expert"], [1, 2]),
        (set_z3_leaf_modules, [f"{__name__}.Expert", "Linear"], [0, 1, 2]),
        (set_z3_leaf_modules_by_name, ["1"], [1]),
        (set_z3_leaf_modules_by_name, ["0", "2"], [0, 2]),
    ],
)
def test_modules_are_marked_by_class_and_by_name(mark, given, positions):
    whole = model()
    marked = mark(whole, given)
    assert [m for m in marked if m in whole.children()] == [whole[i] for i in positions]
    assert get_z3_leaf_modules(whole) == marked
    assert all(m._z3_leaf and z3_leaf_module(m) for m in marked)


def test_modules_are_marked_by_the_ends_of_their_names():
    whole = model()
    assert set_z3_leaf_modules_by_suffix(whole, ["up"]) == [whole[1].up, whole[2].up]


def test_marks_are_taken_back():
    whole = model()
    set_z3_leaf_modules(whole, [Expert, nn.Linear])
    assert unset_z3_leaf_modules(whole, [Expert]) == [whole[1], whole[2]]
    assert get_z3_leaf_modules(whole) == [whole[0], whole[1].up, whole[2].up]


@pytest.mark.parametrize(
    ("mark", "given", "message"),
    [
        (set_z3_leaf_modules, [nn.Conv2d], "Sequential has no module of the classes torch.nn.modules.conv.Conv2d"),
        (set_z3_leaf_modules_by_name, ["7"], "Sequential has no module named 7"),
        (set_z3_leaf_modules_by_suffix, ["down"], "Sequential has no module whose names end in down"),
    ],
)
def test_marking_nothing_is_an_error(mark, given, message):
    with pytest.raises(ValueError, match=message):
        mark(model(), given)


def test_without_names_only_marked_modules_are_leaves():
    whole = model()
    is_leaf = leaf_predicate((), (), ())
    assert not any(is_leaf(name, module) for name, module in whole.named_modules())
    set_z3_leaf_modules_by_name(whole, ["2"])
    assert [name for name, module in whole.named_modules() if is_leaf(name, module)] == ["2"]
