"""``client_state`` as JSON and tensors, and back as it was given."""

from __future__ import annotations

import json
from argparse import Namespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from deepspeed.checkpoint.values import decode, encode

LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
KEYS = st.text() | st.integers() | st.booleans() | st.none() | st.tuples(st.integers(), st.text())


def deeper(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.sets(st.integers() | st.text(), max_size=3)
        | st.dictionaries(KEYS, inner, max_size=3)
        | st.dictionaries(st.just("__is__") | st.text(max_size=2), inner, max_size=3)
        | st.dictionaries(st.sampled_from(["lr", "epochs", "name"]), inner).map(lambda items: Namespace(**items))
    )


def there_and_back(value: Any) -> Any:
    tensors: dict[str, Tensor] = {}
    text = json.dumps(encode(value, "client_state", tensors))
    return decode(json.loads(text), tensors.__getitem__)


def same(first: Any, second: Any) -> bool:
    """Equal, and of the same types all the way down: 1, 1.0 and True are three values."""
    if type(first) is not type(second):
        return False
    if isinstance(first, dict):
        pairs = zip(first.items(), second.items(), strict=True)
        return len(first) == len(second) and all(same(a[0], b[0]) and same(a[1], b[1]) for a, b in pairs)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(same(a, b) for a, b in zip(first, second, strict=True))
    if isinstance(first, Namespace):
        return same(vars(first), vars(second))
    return bool(first == second)


@given(st.recursive(LEAVES, deeper, max_leaves=12))
def test_any_value_comes_back_as_it_was(value):
    assert same(there_and_back(value), value)


@pytest.mark.parametrize("number", [float("inf"), float("-inf"), float("nan")])
def test_numbers_that_are_none_come_back(number):
    assert repr(there_and_back([number])) == repr([number])


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(6).view(2, 3),
        torch.tensor(2.5, dtype=torch.bfloat16),
        torch.empty(0, 3),
        torch.tensor([True, False]),
        torch.randn(4, 5)[:, ::2],
        torch.get_rng_state(),
    ],
    ids=lambda tensor: f"{tensor.dtype} {tuple(tensor.shape)}",
)
def test_tensors_come_back_with_shape_and_dtype(tensor):
    found = there_and_back({"deep": [tensor, (tensor,)]})
    for value in (found["deep"][0], found["deep"][1][0]):
        assert value.dtype == tensor.dtype and torch.equal(value, tensor)


def test_arrays_and_their_numbers_come_back():
    array = np.arange(6, dtype=np.float64).reshape(2, 3)
    found = there_and_back({"array": array, "number": np.float32(0.5), "count": np.int64(3), "flag": np.bool_(True)})
    assert isinstance(found["array"], np.ndarray) and found["array"].dtype == array.dtype
    assert np.array_equal(found["array"], array)
    assert same({key: found[key] for key in ("number", "count", "flag")}, {"number": 0.5, "count": 3, "flag": True})
    state = np.random.RandomState(3).get_state()
    for value, expected in zip(there_and_back(state), state, strict=True):
        assert np.array_equal(value, expected)


def test_later_changes_do_not_reach_what_was_encoded():
    tensor, array, tensors = torch.zeros(3), np.zeros(3), {}
    encode([tensor, array], "client_state", tensors)
    tensor.fill_(1)
    array.fill(1)
    assert all(not value.any() for value in tensors.values())


@pytest.mark.parametrize(
    ("value", "place"),
    [
        ({"deep": {"thing": object()}}, r"client_state\['deep'\]\['thing'\] is a object"),
        ([1, (2, {3: print})], r"client_state\[1\]\[1\]\[3\] is a builtin_function_or_method"),
        ({object(): 1}, "a key of client_state is a object"),
        ({"names": np.array(["a", "b"])}, r"client_state\['names'\] is an array of <U1"),
        ({"day": np.datetime64("2020-01-01")}, r"client_state\['day'\] is a date"),
        ({"z": 1j}, r"client_state\['z'\] is a complex"),
    ],
)
def test_what_a_checkpoint_cannot_hold_is_named_by_its_place(value, place):
    with pytest.raises(TypeError, match=place):
        encode(value, "client_state", {})
