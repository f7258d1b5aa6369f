"""Linear layers in tiles, beside nn.Linear."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deepspeed
from deepspeed.runtime.zero.tiling import TiledLinearReturnBias
from deepspeed.zero import TiledLinear
from tests.parity import Training, assert_close, assert_parity, generator

IN, OUT = 11, 7
splits = pytest.mark.parametrize(("in_splits", "out_splits"), [(1, 1), (2, 1), (1, 3), (4, 3), (IN, OUT)])


def linear(bias: bool = True) -> nn.Linear:
    torch.manual_seed(3)
    return nn.Linear(IN, OUT, bias=bias)


def inputs(*shape: int) -> Tensor:
    return torch.randn(*shape, IN, generator=generator(1))


def like(tiled: TiledLinear, grad: bool = False) -> Tensor:
    """The weight, or its gradient, put together from the tiles."""
    rows = [torch.cat([t.weight.grad if grad else t.weight for t in row], dim=1) for row in tiled.rows()]
    return torch.cat(rows)


@splits
@pytest.mark.parametrize("bias", [True, False])
def test_it_computes_what_a_linear_layer_does_forward_and_backward(in_splits, out_splits, bias):
    plain = linear(bias)
    tiled = TiledLinear(IN, OUT, bias=bias, in_splits=in_splits, out_splits=out_splits, init_linear=plain)
    assert torch.equal(like(tiled), plain.weight)
    assert len(list(tiled.parameters())) == out_splits * (in_splits + bias)
    x, y = inputs(2, 5).requires_grad_(), inputs(2, 5).requires_grad_()
    expected, found = plain(x), tiled(y)
    torch.testing.assert_close(found, expected)
    expected.square().sum().backward()
    found.square().sum().backward()
    torch.testing.assert_close(y.grad, x.grad)
    torch.testing.assert_close(like(tiled, grad=True), plain.weight.grad)


def test_inputs_and_outputs_may_stay_in_parts():
    plain = linear()
    tiled = TiledLinear(IN, OUT, in_splits=3, out_splits=2, input_is_already_split=True, combine_out_splits=False)
    tiled.copy_params_from(plain)
    x = inputs(4)
    found = tiled(x.tensor_split(3, dim=-1))
    assert [part.shape for part in found] == [(4, 4), (4, 3)]
    torch.testing.assert_close(torch.cat(found, dim=-1), plain(x))


class Doubled(nn.Linear):
    """Another class of layer, with an argument of its own."""

    def __init__(self, rows: int, columns: int, bias: bool, factor: float):
        super().__init__(rows, columns, bias=bias)
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * super().forward(x)


class Unadded(nn.Linear):
    """Returns its bias beside its output."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:  # type: ignore[override]
        return nn.functional.linear(x, self.weight), self.bias


def test_tiles_are_made_by_the_given_class():
    tiled = TiledLinear(IN, OUT, in_splits=2, out_splits=2, linear_cls=Doubled, factor=3.0, init_linear=linear())
    torch.testing.assert_close(tiled(inputs(4)), 3 * linear()(inputs(4)))
    assert TiledLinear(IN, OUT, in_splits=2, dtype=torch.float64).tiles[1].bias.dtype == torch.float64


@pytest.mark.parametrize("bias", [True, False])
def test_biases_may_be_returned_instead_of_added(bias):
    plain = linear(bias)
    for combine in (True, False):
        tiled = TiledLinearReturnBias(
            IN, OUT, bias=bias, in_splits=2, out_splits=3, combine_out_splits=combine, linear_cls=Unadded, init_linear=plain
        )
        output, returned = tiled(inputs(4))
        joined = output if combine else torch.cat(output, dim=-1)
        torch.testing.assert_close(joined, nn.functional.linear(inputs(4), plain.weight))
        if bias:
            assert torch.equal(returned if combine else torch.cat(returned), plain.bias)
        else:
            assert returned is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"in_splits": 0}, "in_splits of a TiledLinear is at least 1 and at most in_features 11, got 0"),
        ({"out_splits": 8}, "out_splits of a TiledLinear is at least 1 and at most out_features 7, got 8"),
    ],
)
def test_more_tiles_than_features_are_an_error(arguments, message):
    with pytest.raises(RuntimeError, match=message):
        TiledLinear(IN, OUT, **arguments)


def test_what_does_not_fit_is_an_error_that_says_both_sizes():
    tiled = TiledLinear(IN, OUT, in_splits=2, input_is_already_split=True)
    with pytest.raises(ValueError, match=r"in parts of \[6, 5\] features, got \[5, 6\]"):
        tiled([inputs(1)[:, :5], inputs(1)[:, 5:]])
    with pytest.raises(ValueError, match=r"got \(1, 11\)"):
        tiled(inputs(1))
    with pytest.raises(ValueError, match="takes a tensor"):
        TiledLinear(IN, OUT, in_splits=2)([inputs(1)])
    with pytest.raises(ValueError, match="7 x 11; it cannot be copied from one of 7 x 12"):
        tiled.copy_params_from(nn.Linear(12, 7))
    with pytest.raises(ValueError, match="has a bias too"):
        tiled.copy_params_from(linear(bias=False))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = TiledLinear(6, 24, in_splits=2, out_splits=4)
        self.down = nn.Linear(24, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


def blocks() -> nn.Module:
    return nn.Sequential(Block(), Block())


def squared(model: nn.Module, index: int, backward: Any) -> None:
    backward(model(torch.randn(3, 6, generator=generator(index))).square().mean())


def test_tiles_train_to_the_numbers_of_plain_pytorch(ranks):
    assert_parity(ranks, Training(blocks, squared))


def sharded() -> tuple[int, dict[str, Tensor], Tensor]:
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 0},
    }
    torch.manual_seed(deepspeed.comm.get_rank())
    with deepspeed.zero.Init(config_dict_or_path=config):
        plain = nn.Linear(6, 24)
        model = nn.Sequential(Block(), Block(), nn.Linear(6, 6))
        model.insert(0, nn.Linear(6, 6))
        model[1].up.copy_params_from(plain)
    model[2].up.copy_params_from(plain)
    engine = deepspeed.initialize(model=model, config=config)[0]
    squared(engine, 0, engine.backward)
    engine.step()
    most = engine.sharded_model.scopes.fetcher.most_live_numel
    model[2].up.copy_params_from(plain)
    with deepspeed.zero.GatheredParameters([model, plain]):
        found = {"weight": like(model[2].up), "bias": torch.cat([row[1].bias for row in model[2].up.rows()])}
        return most, found, plain.weight.detach().clone()


def test_tiles_are_gathered_one_by_one_and_copied_into_on_all_ranks(ranks):
    torch.manual_seed(0)
    plain = nn.Linear(6, 24)
    expected = {"weight": plain.weight.detach(), "bias": plain.bias.detach()}
    for most, found, weight in ranks(2, sharded):
        # The largest module is down, 24 x 6 + 6; a whole block would be 318.
        assert most <= 192
        assert_close(found, expected, 0.0)
        assert torch.equal(weight, plain.weight)
