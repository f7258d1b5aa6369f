"""Checkpoints against plain PyTorch without them, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deepspeed
from tests.checkpoint.activations.support import LiveStorages, assert_same_bits, configured, gradients

WIDTH = 16
ROWS = 512
"""Of the batches whose bytes are counted: activations are larger than parameters then."""
SETTINGS: dict[str, dict[str, Any]] = {
    "nothing configured": {},
    "on cpu": {"checkpoint_in_cpu": True},
    "contiguous": {"partition_activations": True, "contiguous_checkpointing": True, "num_checkpoints": 8},
    "observed": {"synchronize": True, "profile": True},
}
Wrapper = Callable[..., Any]
"""Calls its first argument with the others, as a checkpoint or not."""


def plain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs)


def block(width: int = WIDTH) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width), nn.Dropout(0.3))


class Chain(nn.Module):
    """Blocks one after the other; the first has a second turn."""

    def __init__(self, rounds: int = 1) -> None:
        super().__init__()
        self.order = (0, 1, 2, 0) * rounds
        self.blocks = nn.ModuleList([block() for _ in range(3)])

    def forward(self, x: Tensor, call: Wrapper) -> Tensor:
        for index in self.order:
            x = x + call(self.blocks[index], x)
        return x


class KeywordsAndConstants(nn.Module):
    """Arguments of every kind: keywords, an integer mask, text, None, a float, a list with a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = block()

    def step(self, x: Tensor, mask: Tensor, mode: str, *, scale: float, extra: Tensor | None, more: list[Tensor]) -> Tensor:
        assert mode == "masked" and extra is None
        return self.inner(x * more[0]).masked_fill(mask > 0, 0.5) * scale

    def forward(self, x: Tensor, call: Wrapper) -> Tensor:
        mask = (torch.arange(x.numel()) % 3 == 0).int().view_as(x)
        return call(self.step, x, mask, "masked", scale=0.3, extra=None, more=[x.sigmoid()])


class SeveralOutputs(nn.Module):
    """Outputs that are tensors, a number, None, and a tensor without a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = block()

    def step(self, x: Tensor) -> tuple[Any, ...]:
        y = self.inner(x)
        return y, y.argmax(-1), 7, None, {"square": y.square()}

    def forward(self, x: Tensor, call: Wrapper) -> Tensor:
        y, index, number, nothing, more = call(self.step, x)
        assert number == 7 and nothing is None and index.dtype is torch.int64
        return y.sin() + more["square"] * index.unsqueeze(-1)


class Nested(nn.Module):
    """A checkpoint of checkpoints, of which one has another within."""

    def __init__(self) -> None:
        super().__init__()
        self.outer = block()
        self.inner = block()

    def forward(self, x: Tensor, call: Wrapper) -> Tensor:
        def innermost(x: Tensor) -> Tensor:
            return call(self.inner, x).tanh()

        def both(x: Tensor) -> Tensor:
            return call(innermost, call(self.outer, x)) + call(self.inner, x)

        return call(both, x) * 2


class Autocast(nn.Module):
    """A part of the checkpoint runs in bf16 because of where it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = block()

    def forward(self, x: Tensor, call: Wrapper) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y = call(self.inner, x)
            assert y.dtype is torch.bfloat16
        return y.float()


class Strides(nn.Module):
    """Inputs that are transposed, that are a slice, that are expanded, and that have no dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = block(4)

    def step(self, transposed: Tensor, sliced: Tensor, expanded: Tensor, number: Tensor) -> Tensor:
        assert not transposed.is_contiguous() and not sliced.is_contiguous() and expanded.stride(0) == 0
        return self.inner(transposed.t().contiguous()[:, :4]) + (sliced @ transposed[:4, :4]) * expanded * number

    def forward(self, x: Tensor, call: Wrapper) -> Tensor:
        return call(self.step, x.t(), x[:, ::4], x[0, :4].expand(x.shape[0], 4), x.sum())


class NamedRandomStates(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = block()

    def step(self, x: Tensor) -> Tensor:
        tracker = deepspeed.checkpointing.get_cuda_rng_tracker()
        with tracker.fork():
            x = nn.functional.dropout(x)
        with tracker.fork("other"):
            y = torch.rand_like(x)
        return self.inner(x) * y

    def forward(self, x: Tensor, call: Wrapper) -> Tensor:
        deepspeed.checkpointing.model_parallel_cuda_manual_seed(5)
        deepspeed.checkpointing.get_cuda_rng_tracker().add("other", 11)
        x = call(self.step, x)
        return call(self.step, x) * torch.rand_like(x)


MODELS = [Chain, KeywordsAndConstants, SeveralOutputs, Nested, Autocast, Strides, NamedRandomStates]


def trained(make_model: Callable[[], nn.Module], call: Wrapper, *, with_input_gradient: bool = True) -> list[Tensor | None]:
    """The output, the gradients of two backwards, and a number drawn after each."""
    torch.manual_seed(3)
    model = make_model()
    found: list[Tensor | None] = []
    for _ in range(2):
        x = torch.randn(6, WIDTH, requires_grad=with_input_gradient)
        # Not a leaf, as activations are not.
        output = model(x * 1, call)
        output.square().mean().backward()
        found += [output.detach(), *gradients([x, *model.parameters()]), torch.rand(2)]
    return found


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("make_model", MODELS)
def test_outputs_gradients_and_random_numbers_have_the_bits_of_plain_pytorch(make_model, settings):
    with configured(**SETTINGS[settings]):
        found = trained(make_model, deepspeed.checkpointing.checkpoint)
        assert_same_bits(found, trained(make_model, plain))


@pytest.mark.parametrize("settings", SETTINGS)
def test_parameters_get_gradients_where_no_argument_requires_one(settings):
    with configured(**SETTINGS[settings]):
        found = trained(Chain, deepspeed.checkpointing.non_reentrant_checkpoint, with_input_gradient=False)
    assert_same_bits(found, trained(Chain, plain, with_input_gradient=False))
    assert found[2] is not None, "there is a gradient"


@pytest.mark.parametrize("settings", SETTINGS)
def test_gradients_can_be_asked_for_twice_and_of_second_order(settings):
    def second_order(call: Wrapper) -> list[Tensor | None]:
        torch.manual_seed(2)
        inner = block()
        x = torch.randn(4, WIDTH, requires_grad=True)
        (y,) = torch.autograd.grad(call(inner, x * 2).square().sum(), x, create_graph=True)
        total = y.square().sum()
        total.backward(retain_graph=True)
        total.backward()
        return gradients([x, *inner.parameters()])

    with configured(**SETTINGS[settings]):
        assert_same_bits(second_order(deepspeed.checkpointing.checkpoint), second_order(plain))


def test_a_parameter_among_the_arguments_gets_its_gradient():
    weight = nn.Parameter(torch.randn(WIDTH, WIDTH))
    x = torch.randn(3, WIDTH)
    with configured(**SETTINGS["contiguous"]):
        deepspeed.checkpointing.checkpoint(torch.matmul, x, weight).square().sum().backward()
    (found,) = gradients([weight])
    (x @ weight).square().sum().backward()
    assert_same_bits([found], [weight.grad])


def test_backward_calls_the_function_once_more_so_hooks_of_modules_run():
    calls: list[str] = []
    inner = block()
    inner.register_forward_pre_hook(lambda *_: calls.append("before"))
    inner[0].register_forward_hook(lambda *_: calls.append("after"))
    with configured():
        output = deepspeed.checkpointing.checkpoint(inner, torch.randn(2, WIDTH, requires_grad=True))
        assert calls == ["before", "after"]
        output.sum().backward()
    assert calls == ["before", "after"] * 2


def test_without_gradients_the_function_is_called_and_nothing_is_kept():
    with configured(**SETTINGS["contiguous"]), torch.no_grad():
        for _ in range(20):
            output = deepspeed.checkpointing.checkpoint(block(), torch.randn(2, WIDTH))
    assert not output.requires_grad


def test_the_class_form_collects_all_outputs_and_returns_the_tensors():
    x = torch.ones(2, requires_grad=True)
    several: list[Any] = []
    one: list[Any] = []
    apply = deepspeed.checkpointing.CheckpointFunction.apply
    y, z = apply(lambda x, k: (x * k, "text", x + k), several, x, 3)
    assert several[0] is y and several[1:] == ["text", z]
    assert one == [] and apply(torch.exp, one, x) is one[0]
    (y * z).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [15.0, 15.0]


@dataclass(frozen=True)
class Bytes:
    """Of storages that are alive after a forward, at most, and after the backward without its gradients."""

    kept: int
    peak: int
    left: int


def measured(call: Wrapper, model: nn.Module) -> Bytes:
    x = torch.randn(ROWS, WIDTH, requires_grad=True)
    with LiveStorages([x, *model.parameters()]) as storages:
        loss = model(x * 1, call).sum()
        kept = storages.nbytes() - loss.nbytes
        loss.backward()
        left = storages.nbytes() - loss.nbytes
    found = gradients([x, *model.parameters()])
    return Bytes(kept, storages.peak, left - sum(gradient.nbytes for gradient in found if gradient is not None))


def test_a_checkpoint_keeps_its_input_and_nothing_else_until_backward():
    activation = ROWS * WIDTH * 4
    model = Chain()
    with configured():
        found = measured(deepspeed.checkpointing.checkpoint, model)
    without = measured(plain, model)
    assert found.kept == 4 * activation and found.left == without.left == 0
    # For each block two tensors of twice the width, and the mask of the dropout.
    assert without.kept >= 4 * 4 * activation and without.peak > 2 * found.peak


def test_buffers_hold_the_inputs_of_all_checkpoints_and_stay():
    activation = ROWS * WIDTH * 4
    model = Chain()
    with configured(**SETTINGS["contiguous"]):
        for _ in range(2):
            found = measured(deepspeed.checkpointing.checkpoint, model)
            assert found.kept == found.left == 8 * activation
        assert found.peak < measured(plain, model).peak


def test_a_nested_checkpoint_keeps_nothing_of_its_own():
    activation = ROWS * WIDTH * 4
    for settings in SETTINGS.values():
        with configured(**settings):
            rows = settings.get("num_checkpoints", 1)
            assert measured(deepspeed.checkpointing.checkpoint, Nested()).kept == rows * activation


def test_an_input_that_is_changed_in_place_before_backward_is_an_error():
    mask = torch.ones(3, WIDTH)
    with configured(**SETTINGS["contiguous"]):
        x = torch.randn(3, WIDTH, requires_grad=True)
        output = deepspeed.checkpointing.checkpoint(lambda x, mask: (x * mask).square(), x * 1, mask)
        mask.zero_()
        with pytest.raises(RuntimeError, match=r"an input of a checkpoint, of shape \(3, 16\), was changed in place"):
            output.sum().backward()


def test_an_activation_that_was_copied_may_be_changed_in_place():
    def trained_in_place(call: Wrapper) -> Tensor | None:
        leaf = torch.linspace(-1, 1, 8, requires_grad=True)
        x = leaf * 1
        y = call(torch.square, x.clone())
        x.add_(1)
        (x + y).sum().backward()
        return leaf.grad

    with configured(**SETTINGS["contiguous"]):
        assert_same_bits([trained_in_place(deepspeed.checkpointing.checkpoint)], [trained_in_place(plain)])


def test_a_function_that_changes_its_copied_input_in_place_does_not_change_what_is_kept():
    def second_backward(call: Wrapper) -> Tensor | None:
        leaf = torch.linspace(-1, 1, 8, requires_grad=True)
        y = call(lambda x: x.mul_(3).exp(), leaf * 1).sum()
        y.backward(retain_graph=True)
        leaf.grad = None
        y.backward()
        return leaf.grad

    with configured(**SETTINGS["contiguous"]):
        assert_same_bits([second_backward(deepspeed.checkpointing.checkpoint)], [second_backward(plain)])


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_of_the_function_goes_through_and_the_next_checkpoint_works(error):
    def failing(x: Tensor) -> Tensor:
        raise error("on purpose")

    with configured(**SETTINGS["contiguous"]):
        with pytest.raises(error, match="on purpose"):
            deepspeed.checkpointing.checkpoint(failing, torch.ones(2, requires_grad=True))
        assert_same_bits(trained(Chain, deepspeed.checkpointing.checkpoint), trained(Chain, plain))


def test_calling_the_block_instead_of_handing_it_over_is_an_error_that_says_so():
    x = torch.ones(2, WIDTH)
    with pytest.raises(TypeError, match=r"takes a function and its arguments, checkpoint\(block, x\); found Tensor"):
        deepspeed.checkpointing.checkpoint(block()(x))


def test_a_function_that_does_something_else_the_second_time_is_an_error():
    sizes = iter([3, 4])
    with configured(), pytest.raises(RuntimeError, match="different metadata"):
        x = torch.randn(4, 4, requires_grad=True)
        deepspeed.checkpointing.checkpoint(lambda x: x[: next(sizes)].square(), x).sum().backward()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("settings", SETTINGS)
def test_on_cuda_gradients_have_the_bits_of_plain_pytorch(settings):
    def on_cuda(call: Wrapper) -> list[Tensor | None]:
        with torch.device("cuda"):
            return trained(NamedRandomStates, call)

    with configured(**SETTINGS[settings]) if SETTINGS[settings] else nullcontext():
        assert_same_bits(on_cuda(deepspeed.checkpointing.checkpoint), on_cuda(plain))
