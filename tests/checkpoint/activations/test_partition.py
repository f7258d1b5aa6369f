"""Activations split over real model-parallel ranks, whose group is all ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import deepspeed
from tests.checkpoint.activations.support import AllRanks, assert_same_bits, configured, gradients
from tests.checkpoint.activations.test_checkpointing import (
    MODELS,
    ROWS,
    WIDTH,
    Bytes,
    Chain,
    NamedRandomStates,
    measured,
    plain,
    trained,
)

CONTIGUOUS = {"contiguous_checkpointing": True, "num_checkpoints": 12}
REPLICATED = [model for model in MODELS if model is not NamedRandomStates]
"""Models whose activations are the same on all ranks."""

SETTINGS: list[dict[str, Any]] = [{}, CONTIGUOUS, {"checkpoint_in_cpu": True}, {**CONTIGUOUS, "checkpoint_in_cpu": True}]


def train_each_model(settings: dict[str, Any]) -> None:
    for make_model in REPLICATED:
        with configured(AllRanks(), partition_activations=True, **settings):
            found = trained(make_model, deepspeed.checkpointing.checkpoint)
        assert_same_bits(found, trained(make_model, plain))


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("size", [2, 3])
def test_outputs_gradients_and_random_numbers_have_the_bits_of_plain_pytorch(ranks, settings, size):
    ranks(size, train_each_model, settings)


class Copied(torch.autograd.Function):
    """Into a model-parallel region: the gradient is summed over the ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        dist.all_reduce(gradient)
        return gradient


class Summed(torch.autograd.Function):
    """Out of a model-parallel region: the sum over the ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class ParallelBlock(nn.Module):
    """A perceptron of which each rank holds a part of the hidden layer, with dropout there and after it."""

    def __init__(self, part: int, parts: int) -> None:
        super().__init__()
        whole = nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH, bias=False)
        self.enter = nn.Parameter(whole[0].weight.chunk(parts)[part].clone())
        self.leave = nn.Parameter(whole[1].weight.chunk(parts, dim=1)[part].clone())

    def forward(self, x: Tensor) -> Tensor:
        hidden = nn.functional.gelu(Copied.apply(x) @ self.enter.t())
        with deepspeed.checkpointing.get_cuda_rng_tracker().fork():
            hidden = nn.functional.dropout(hidden, 0.4)
        return nn.functional.dropout(Summed.apply(hidden @ self.leave.t()), 0.4)


def train_parallel(call: Any) -> list[Tensor | None]:
    torch.manual_seed(3)
    blocks = nn.ModuleList([ParallelBlock(dist.get_rank(), dist.get_world_size()) for _ in range(3)])
    deepspeed.checkpointing.model_parallel_cuda_manual_seed(9)
    found: list[Tensor | None] = []
    for _ in range(2):
        x = torch.randn(5, WIDTH, requires_grad=True)
        hidden = x * 1
        for part in blocks:
            hidden = hidden + call(part, hidden)
        hidden.square().sum().backward()
        found += [hidden.detach(), *gradients([x, *blocks.parameters()])]
    return found


def compare_parallel() -> tuple[Tensor, Tensor]:
    with configured(AllRanks(), partition_activations=True):
        found = train_parallel(deepspeed.checkpointing.checkpoint)
        assert_same_bits(found, train_parallel(plain))
    assert found[0] is not None and found[2] is not None
    return found[0], found[2]


def test_a_tensor_parallel_model_with_dropout_trains_to_the_same_bits(ranks):
    (output, gradient), (other_output, other_gradient) = ranks(2, compare_parallel)
    assert torch.equal(output, other_output) and not torch.equal(gradient, other_gradient)


def bytes_of(settings: dict[str, Any]) -> Bytes:
    torch.manual_seed(1)
    with configured(AllRanks(), **settings):
        return measured(deepspeed.checkpointing.checkpoint, Chain(rounds=3))


def test_each_rank_keeps_half_of_what_two_ranks_save(ranks):
    activation = ROWS * WIDTH * 4
    whole, part, rows = (
        ranks(2, bytes_of, settings)
        for settings in ({}, {"partition_activations": True}, {"partition_activations": True, **CONTIGUOUS})
    )
    for rank in range(2):
        assert whole[rank].kept == 12 * activation
        assert part[rank].kept == rows[rank].kept == 6 * activation
        assert part[rank].left == 0 and rows[rank].left == 6 * activation
        # Of the six that are saved, the one that is recomputed is there as a whole, beside its slice.
        assert part[rank].peak <= whole[rank].peak - 4 * activation


def test_an_input_that_does_not_divide_is_split_with_a_shorter_last_slice(ranks):
    for kept in ranks(3, kept_of, (4, 2), torch.float32), ranks(3, kept_of, (2, 2), torch.bfloat16):
        assert kept in ([12, 12, 8], [4, 4, 0])


def kept_of(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Bytes of an activation that this rank keeps; backward recomputes from the whole."""
    from deepspeed.checkpoint.activations.inputs import Kept

    seen = []

    def function(x: Tensor) -> Tensor:
        seen.append(x.detach().clone())
        return x.square()

    with configured(AllRanks(), partition_activations=True):
        x = torch.randn(shape, dtype=dtype).requires_grad_()
        store = deepspeed.checkpointing._PROCESS.active.store
        assert store is not None
        kept = store._keep(x * 1, 0)
        assert isinstance(kept, Kept)
        deepspeed.checkpointing.checkpoint(function, x * 1).sum().backward()
    assert_same_bits(seen, [x, x])
    return kept.elements.untyped_storage().nbytes()


def volume() -> tuple[int, int]:
    with configured(AllRanks(), partition_activations=True):
        x = torch.randn(6, WIDTH, requires_grad=True)
        shared = torch.randn(6, WIDTH)
        log = deepspeed.checkpointing._PROCESS.active.store._communicator.log  # type: ignore[union-attr]
        output = deepspeed.checkpointing.checkpoint(torch.mul, x * 1, shared)
        before = log.total("all_gather").count
        output.sum().backward()
        return before, log.total("all_gather").message_nbytes


def test_backward_gathers_each_activation_once_and_nothing_else(ranks):
    assert ranks(2, volume) == [(0, 6 * WIDTH * 4)] * 2


def different(what: str) -> str:
    rank = dist.get_rank()
    shape = (4, WIDTH + rank) if what == "shapes" else (4, WIDTH)
    x = torch.full(shape, 1.0 + (rank if what == "values" else 0), dtype=torch.float64 if what == "dtypes" and rank else None)
    with configured(AllRanks(), partition_activations=True), pytest.raises(ValueError) as caught:
        deepspeed.checkpointing.checkpoint(torch.square, x.requires_grad_() * 1)
    return str(caught.value)


@pytest.mark.parametrize("what", ["values", "shapes", "dtypes"])
def test_different_activations_are_an_error_on_every_rank(ranks, what):
    for rank, message in enumerate(ranks(2, different, what)):
        assert "splits activations that are the same on all model-parallel ranks; found different ones" in message
        assert f"on model-parallel rank {1 - rank}" in message and "are data-parallel" in message


def slightly_different() -> None:
    with configured(AllRanks(), partition_activations=True):
        x = (torch.ones(40) + 1e-6 * dist.get_rank()).requires_grad_()
        deepspeed.checkpointing.checkpoint(torch.square, x * 1).sum().backward()


def test_activations_that_differ_by_rounding_are_fine(ranks):
    ranks(2, slightly_different)


def different_afterwards() -> list[float]:
    """Data-parallel training of a model-parallel group of one each: nothing is split, nothing compared."""

    class Alone:
        def get_model_parallel_rank(self) -> int:
            return 0

        def get_model_parallel_world_size(self) -> int:
            return 1

        def get_model_parallel_group(self) -> Any:
            raise AssertionError("a group of one needs no group")

    with configured(Alone(), partition_activations=True):
        x = torch.full((2,), float(dist.get_rank())).requires_grad_()
        deepspeed.checkpointing.checkpoint(torch.square, x * 1).sum().backward()
        assert x.grad is not None
        return x.grad.tolist()


def test_a_model_parallel_group_of_one_splits_nothing(ranks):
    assert ranks(2, different_afterwards) == [[0.0, 0.0], [2.0, 2.0]]
