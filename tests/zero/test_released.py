"""Parameters without values, noticed when somebody computes with them."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn

from deepspeed.zero.released import (
    HOME,
    RELEASED_VERSION,
    ReleasedParameter,
    describe,
    expose,
    forget,
    home_of,
    missed_by_autograd,
    release,
    shape_of,
)


class Recording:
    """A home that notes what was touched, and gives the values back."""

    def __init__(self, values: Tensor):
        self.values = values
        self.touches: list[str] = []

    def touched(self, parameter: nn.Parameter, operation: str) -> None:
        self.touches.append(operation)
        expose(parameter, self.values)

    def copied(self, parameter: nn.Parameter) -> nn.Parameter:
        return nn.Parameter(self.values.clone())


def parameter_of(values: Tensor) -> tuple[nn.Parameter, Recording]:
    parameter, home = nn.Parameter(values), Recording(values)
    describe(parameter, home, shape=tuple(values.shape), shards=2)
    release(parameter)
    return parameter, home


@pytest.mark.parametrize(
    ("compute", "operation"),
    [
        (lambda p: p + 1, "add"),
        (lambda p: 1 + p, "add"),
        (lambda p: torch.stack([torch.zeros(2, 3), p]), "stack"),
        (lambda p: nn.functional.linear(torch.ones(3), weight=p), "linear"),
        (lambda p: p.sum(), "sum"),
        (lambda p: p.T, "T"),
        (lambda p: p.data * 2, "mul"),
        (lambda p: torch.cat([p.data, p.detach()]), "cat"),
        (lambda p: p.data[1], "__getitem__"),
        (lambda p: p.detach().to(torch.float64), "to"),
        (lambda p: p.to(torch.float64), "to"),
        (lambda p: p[0], "__getitem__"),
        (lambda p: p.tolist(), "tolist"),
        (lambda p: torch.ones(2, 3).copy_(p), "copy_"),
        (lambda p: list(p), "unbind"),
        (lambda p: p.clone(), "clone"),
    ],
)
def test_computing_touches_the_parameter_once(compute, operation):
    parameter, home = parameter_of(torch.arange(6.0).view(2, 3))
    whole = nn.Parameter(home.values)
    with torch.no_grad():
        found, expected = compute(parameter), compute(whole)
    assert len(home.touches) == 1
    assert operation in home.touches[0]
    for ours, theirs in zip(found, expected, strict=True) if isinstance(found, list) else [(found, expected)]:
        assert torch.equal(torch.as_tensor(ours), torch.as_tensor(theirs))


def test_writing_touches_the_parameter():
    parameter, home = parameter_of(torch.zeros(2, 3))
    with torch.no_grad():
        nn.init.ones_(parameter)
    assert bool((home.values == 1).all())
    parameter, home = parameter_of(torch.zeros(2, 3))
    parameter.data = torch.ones(2, 3)
    assert home.touches == ["data"]
    assert bool((parameter == 1).all())


def test_questions_touch_nothing():
    parameter, home = parameter_of(torch.zeros(2, 3))
    parameter.tag = 1
    model = nn.Module()
    model.weight = parameter
    answers = (parameter.shape, parameter.numel(), parameter.dtype, parameter.device, parameter.requires_grad, parameter.grad)
    assert answers == (torch.Size([0]), 0, torch.float32, torch.device("cpu"), True, None)
    assert (shape_of(parameter), parameter.ds_shape, parameter.ds_numel, parameter.partition_numel()) == ((2, 3), (2, 3), 6, 3)
    repr(parameter), hash(parameter), parameter.is_leaf, parameter.detach(), model.state_dict(), list(model.parameters())
    parameter.requires_grad_(False)
    model.to("cpu").to(torch.float32).float()
    assert isinstance(parameter, nn.Parameter)
    assert type(parameter) is ReleasedParameter
    assert home.touches == []
    assert model.weight is parameter


def test_a_copy_is_what_the_home_makes_once_for_a_parameter_that_is_shared():
    parameter, home = parameter_of(torch.ones(2, 3))
    first, second = copy.deepcopy([parameter, parameter])
    assert first is second
    assert torch.equal(first, home.values)
    assert home_of(first) is None


def test_a_parameter_without_a_home_has_no_values_and_says_so():
    parameter, _ = parameter_of(torch.zeros(2, 3))
    forget(parameter)
    with pytest.raises(RuntimeError, match="sum was called on a copy of a sharded parameter"):
        parameter.sum()


def test_data_and_detach_are_the_values_when_these_are_needed():
    parameter, home = parameter_of(torch.arange(6.0).view(2, 3))
    data, detached = parameter.data, parameter.detach()
    assert (data.shape, detached.device, data.requires_grad, home.touches) == ((0,), torch.device("cpu"), False, [])
    data.mul_(2)
    assert home.touches == ["mul_"]
    assert torch.equal(parameter.detach(), torch.arange(6.0).view(2, 3) * 2)
    assert torch.equal(detached + data, 2 * parameter.detach())
    release(parameter)
    assert torch.equal(copy.deepcopy(data), home.values)
    release(parameter)
    buffer = io.BytesIO()
    torch.save(detached, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer), home.values)
    assert home.touches == ["mul_", "clone", "pickle"]


def test_padding_by_nothing_is_nothing():
    parameter, home = parameter_of(torch.ones(3))
    parameter.data = nn.functional.pad(parameter.data, (0, 0))
    assert home.touches == []
    assert nn.functional.pad(parameter, (0, 1)).tolist() == [1, 1, 1, 0]


def test_what_was_described_is_forgotten_but_for_the_identifier():
    parameter, home = parameter_of(torch.zeros(2, 3))
    identifier = parameter.ds_id
    expose(parameter, home.values)
    forget(parameter)
    assert vars(parameter) == {"ds_id": identifier}
    describe(parameter, home, shape=(2, 3), shards=2)
    assert (parameter.ds_id, getattr(parameter, HOME)) == (identifier, home)


def test_backward_through_saved_values_is_possible_only_while_the_parameter_is_whole():
    parameter, home = parameter_of(torch.arange(6.0).view(2, 3))
    expose(parameter, home.values)
    x = torch.ones(2, 3, requires_grad=True)
    result = (x * parameter).sum() + (x @ parameter.t()).sum()
    release(parameter)
    with pytest.raises(RuntimeError) as caught:
        result.backward(retain_graph=True)
    assert missed_by_autograd(caught.value) == parameter.ds_id
    expose(parameter, home.values)
    result.backward()
    assert torch.equal(x.grad, home.values + home.values.sum(0))


def test_a_change_in_place_is_noticed_by_autograd_as_ever():
    parameter, home = parameter_of(torch.ones(2, 3))
    expose(parameter, home.values)
    result = (torch.ones(2, 3, requires_grad=True) * parameter).sum()
    with torch.no_grad():
        parameter.add_(1)
    release(parameter)
    assert parameter._version >= RELEASED_VERSION
    expose(parameter, home.values)
    with pytest.raises(RuntimeError, match="is at version 1; expected version 0") as caught:
        result.backward()
    assert missed_by_autograd(caught.value) is None
