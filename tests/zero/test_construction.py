from __future__ import annotations

import gc
import io
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.parameter import is_lazy

import deepspeed
from deepspeed.zero.parameters import FlatParameters
from deepspeed.zero.released import ReleasedParameter, home_of
from tests.parity import assert_equal
from tests.zero.zoo import MODELS, Applied, Rewritten, Small, Tied

Result = dict[str, Tensor]


def config(threshold: int = 5, **more: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": threshold}, **more}


def values(model: nn.Module) -> Result:
    with deepspeed.zero.GatheredParameters(model):
        return {name: value.detach().clone() for name, value in model.state_dict().items()}


def seed(offset: int = 0) -> None:
    torch.manual_seed(5 + offset)


def constructed(name: str, threshold: int, same_seed: bool) -> tuple[Result, Tensor]:
    """The values and what the generator gives next."""
    seed(0 if same_seed else deepspeed.comm.get_rank())
    with deepspeed.zero.Init(config_dict_or_path=config(threshold)):
        model = MODELS[name]()
    following = torch.rand(3)
    for parameter in model.parameters():
        assert home_of(parameter) is not None
        assert (type(parameter) is ReleasedParameter) == (parameter.ds_numel > threshold)
    return values(model), following


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_is_constructed_in_shards_has_the_values_of_plain_construction(ranks, name):
    seed()
    plain, following = MODELS[name](), torch.rand(3)
    for found, found_following in ranks(2, constructed, name, 5, True):
        assert_equal(found, {key: value.detach() for key, value in plain.state_dict().items()})
        assert torch.equal(found_following, following)


@pytest.mark.parametrize("name", ["applied", "rewritten", "small", "transformer", "listed"])
@pytest.mark.parametrize("size, threshold", [(1, 5), (3, 5), (2, 20)])
def test_where_ranks_draw_other_numbers_all_have_those_of_the_first(ranks, name, size, threshold):
    seed()
    plain, following = MODELS[name](), torch.rand(3)
    results = ranks(size, constructed, name, threshold, False)
    for found, _ in results:
        assert_equal(found, {key: value.detach() for key, value in plain.state_dict().items()})
    assert torch.equal(results[0][1], following)


def converted(name: str) -> tuple[Result, list[torch.dtype]]:
    seed()
    with deepspeed.zero.Init(config_dict_or_path=config(bf16={"enabled": True})):
        model = MODELS[name]()
    return values(model), [p.dtype for p in model.parameters()]


@pytest.mark.parametrize("name", ["applied", "tied", "clones", "small"])
def test_parameters_are_drawn_in_the_dtype_of_the_code_and_kept_in_the_configured_one(ranks, name):
    seed()
    plain = MODELS[name]()
    for found, dtypes in ranks(2, converted, name):
        assert set(dtypes) == {torch.bfloat16}
        assert_equal(found, {key: value.detach().bfloat16() for key, value in plain.state_dict().items()})


def alive() -> int:
    """Elements of the parameters that are whole."""
    found = [p for p in gc.get_objects() if issubclass(type(p), nn.Parameter) and type(p) is not ReleasedParameter]
    return sum(p.numel() for p in found if not is_lazy(p))


def whole_numels(name: str) -> int:
    """The most elements of parameters that are alive at once, when a slice is put in."""
    most = 0
    gc.collect()
    before = alive()
    put_in = FlatParameters.put_in

    def counting(self: Any, *args: Any) -> None:
        nonlocal most
        most = max(most, alive() - before)
        put_in(self, *args)

    FlatParameters.put_in = counting  # type: ignore[method-assign]
    try:
        with deepspeed.zero.Init(config_dict_or_path=config()):
            model = MODELS[name]()
    finally:
        FlatParameters.put_in = put_in  # type: ignore[method-assign]
    assert len(list(model.parameters())) >= 12
    return most


@pytest.mark.parametrize("name, layer", [("listed", 8 * 8 + 8), ("clones", 24 * 8 + 8), ("applied", 9 * 9 + 9)])
def test_few_layers_are_whole_at_once_wherever_the_others_are(ranks, name, layer):
    assert max(ranks(2, whole_numels, name)) <= 5 * layer


class _Broken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        nn.init.ones_(self.linear.weight)
        raise ArithmeticError("broken")


def hooks() -> list[int]:
    kinds = ("_global_parameter_registration_hooks", "_global_module_registration_hooks", "_global_buffer_registration_hooks")
    return [len(getattr(torch_module, kind)) for kind in kinds]


def breaks() -> None:
    before = hooks()
    for _ in range(2):
        with pytest.raises(ArithmeticError), deepspeed.zero.Init(config_dict_or_path=config()):
            _Broken()
        assert hooks() == before
    assert type(nn.Linear(8, 8).weight) is nn.Parameter
    with deepspeed.zero.Init(config_dict_or_path=config()):
        model = nn.Linear(8, 8)
    assert type(model.weight) is ReleasedParameter and hooks() == before


def test_an_exception_in_a_constructor_leaves_torch_as_it_was(ranks):
    ranks(2, breaks)


def touches_after() -> None:
    with deepspeed.zero.Init(config_dict_or_path=config()):
        model = Rewritten()
    for use in (
        lambda p: p.data.normal_(),
        lambda p: p.detach() + 1,
        lambda p: nn.init.normal_(p),
        lambda p: p.data.__setitem__(0, 1),
        lambda p: torch.cat([torch.zeros(2), p.data]),
        lambda p: setattr(p, "data", torch.zeros(6, 6)),
        lambda p: torch.save(p.data, io.BytesIO()),
    ):
        with pytest.raises(RuntimeError, match=r"'Linear.weight' \(6, 6\) is sharded by ZeRO stage 3 and was used"):
            use(model.a.weight)
    assert model.a.weight.shape == model.a.weight.data.shape == model.state_dict()["a.weight"].shape == (6, 6)
    assert model.a.weight.data.dtype == torch.float32 and model.to("cpu") is model
    model.a.bias.data = nn.functional.pad(model.a.bias.data, (0, model.a.weight.shape[0] - model.a.bias.shape[0]))
    kept = model.a.weight.data
    with deepspeed.zero.GatheredParameters(model.a.weight):
        assert torch.equal(kept * 1, model.a.weight)
        assert torch.equal(torch.stack([kept, kept])[1], model.a.weight)


def test_after_construction_computing_with_a_sharded_parameter_is_an_error_that_names_it(ranks):
    ranks(2, touches_after)


def nested() -> list[Result]:
    before = hooks()
    models = []
    for with_outer in (True, False):
        seed()
        with deepspeed.zero.Init(config_dict_or_path=config(), enabled=with_outer):
            first = nn.Linear(8, 8)
            with deepspeed.zero.Init(config_dict_or_path=config(1000)):
                second = Applied()
            third = Tied()
        assert hooks() == before
        models += [first, second, third]
    assert type(models[1].first.weight) is ReleasedParameter and type(models[4].first.weight) is nn.Parameter
    return [values(model) for model in models]


def test_contexts_may_be_nested_and_make_several_models(ranks):
    seed()
    plain = [nn.Linear(8, 8), Applied(), Tied()]
    for found in ranks(2, nested):
        for result, model in zip(found, plain * 2, strict=True):
            assert_equal(result, {name: value.detach() for name, value in model.state_dict().items()})


def without_leaks() -> None:
    with deepspeed.zero.Init(config_dict_or_path=config()):
        model = Tied()
        replaced = weakref.ref(home_of(nn.Sequential(nn.Linear(8, 8))[0].weight))
        gc.collect()
        assert replaced() is None
    kept = weakref.ref(home_of(model.head.weight))
    del model
    gc.collect()
    assert kept() is None


def test_shards_live_as_long_as_their_parameters(ranks):
    ranks(2, without_leaks)


def special() -> None:
    with deepspeed.zero.Init(config_dict_or_path=config()):
        meta = nn.Linear(8, 8, device="meta")
        lazy = nn.LazyLinear(8)
        model = nn.ModuleList([meta, lazy, nn.Linear(4, 4)])
    assert model[0].weight.is_meta and model[0].weight.shape == (8, 8)
    assert model[1](torch.zeros(2, 3)).shape == (2, 8)
    assert type(model[2].weight) is ReleasedParameter
    model[0].to_empty(device="cpu")
    nn.init.ones_(model[0].weight)


def test_parameters_without_values_stay_as_they_are(ranks):
    ranks(2, special)


def small_ones_differ() -> Result:
    seed(deepspeed.comm.get_rank())
    with deepspeed.zero.Init(config_dict_or_path=config(1000)):
        model = Small()
    return values(model)


def test_small_parameters_are_whole_with_the_values_that_the_first_rank_wrote_last(ranks):
    seed()
    plain = {name: value.detach() for name, value in Small().state_dict().items()}
    for found in ranks(3, small_ones_differ):
        assert_equal(found, plain)
