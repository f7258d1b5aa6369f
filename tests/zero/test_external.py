from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

from deepspeed.zero import register_external_parameter, unregister_external_parameter
from deepspeed.zero.external import external_parameters


def test_parameters_are_registered_once_and_taken_back():
    module, other = nn.Linear(2, 2), nn.Linear(2, 2)
    assert list(external_parameters(module)) == []
    for parameter in (other.weight, other.bias, other.weight):
        register_external_parameter(module, parameter)
    assert [id(p) for p in external_parameters(module)] == [id(other.weight), id(other.bias)]
    assert list(external_parameters(other)) == []
    unregister_external_parameter(module, other.weight)
    assert [id(p) for p in external_parameters(module)] == [id(other.bias)]
    with pytest.raises(ValueError, match="was not registered as external to this Linear"):
        unregister_external_parameter(module, other.weight)


def test_anything_but_a_module_and_a_parameter_is_refused():
    module = nn.Linear(2, 2)
    with pytest.raises(TypeError, match=r"expected a torch.nn.Module, got int"):
        register_external_parameter(1, module.weight)
    with pytest.raises(TypeError, match=r"expected a torch.nn.Parameter, got Tensor"):
        register_external_parameter(module, torch.ones(2))


def test_a_module_that_is_gone_leaves_nothing_behind():
    module, other = nn.Linear(2, 2), nn.Linear(2, 2)
    register_external_parameter(module, other.weight)
    weight = weakref.ref(other.weight)
    del module, other
    gc.collect()
    assert weight() is None
