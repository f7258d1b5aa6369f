"""Kinds of models, each trained by the engine to the numbers of plain PyTorch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from tests.parity import Training, assert_parity, generator

WIDTH = 12


def inputs(index: int, rows: int = 3) -> Tensor:
    return torch.randn(rows, WIDTH, generator=generator(index))


def tokens(index: int) -> Tensor:
    return torch.randint(0, 17, (4, 5), generator=generator(index))


def squared_output(model: nn.Module, index: int, backward) -> None:
    backward(model(inputs(index)).square().mean())


class TiedLanguageModel(nn.Module):
    """The output layer is the embedding; one linear layer is used twice."""

    def __init__(self, sparse: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(17, WIDTH, sparse=sparse)
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.mix_again = self.mix
        self.head = nn.Linear(WIDTH, 17, bias=False)
        if not sparse:
            self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        logits = self.head(torch.tanh(self.mix_again(torch.tanh(self.mix(self.embedding(x))))))
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), x[:, 1:].flatten())


def language_loss(model: nn.Module, index: int, backward) -> None:
    backward(model(tokens(index)))


@pytest.mark.parametrize("bucket", [0, 200, 10_000])
def test_tied_weights(ranks, bucket):
    config = {"zero_optimization": {"reduce_bucket_size": bucket}}
    assert_parity(ranks, Training(TiedLanguageModel, language_loss, config=config))


def with_sparse_gradients() -> nn.Module:
    return TiedLanguageModel(sparse=True)


def with_dense_gradients() -> nn.Module:
    model = TiedLanguageModel(sparse=True)
    model.embedding.sparse = False
    return model


@pytest.mark.parametrize("accumulation", [1, 2])
def test_sparse_embedding_gradients_are_reduced_densely(ranks, accumulation):
    # torch's own SGD refuses weight decay on sparse gradients: the model to compare with produces dense ones.
    sparse = Training(with_sparse_gradients, language_loss, accumulation=accumulation)
    assert_parity(ranks, sparse, plain=replace(sparse, make_model=with_dense_gradients))


class Lora(nn.Module):
    """A frozen linear layer with a trainable low-rank addition."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.down = nn.Linear(WIDTH, 2, bias=False)
        self.up = nn.Linear(2, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def lora() -> nn.Module:
    return nn.Sequential(Lora(), nn.Tanh(), Lora(), nn.LayerNorm(WIDTH).requires_grad_(False))


def test_frozen_parameters_and_low_rank_additions(ranks):
    assert_parity(ranks, Training(lora, squared_output))


class Branches(nn.Module):
    """Four layers of which an input uses some; each is laid out in a bucket of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(4)])

    def forward(self, x: Tensor, *chosen: int) -> Tensor:
        for index in chosen:
            x = torch.tanh(self.layers[index](x))
        return x


def other_branches_in_each_step(model: nn.Module, index: int, backward) -> None:
    """With two ranks: layer 0 always, layers 1 and 2 in alternate steps, layer 3 never."""
    backward(model(inputs(index), 0, 1 + index // 2 % 2).square().mean())


def other_branches_on_each_rank(model: nn.Module, index: int, backward) -> None:
    """With two ranks: rank 0 uses layers 0 and 1 and rank 1 layers 2 and 0, in other order; nobody layer 3."""
    chosen = (0, 1) if index % 2 == 0 else (2, 0)
    backward(model(inputs(index), *chosen).square().mean())


def last_branch_first_used_late(model: nn.Module, index: int, backward) -> None:
    """Layer 3 joins from the third step on, on rank 1 alone."""
    chosen = (0, 3) if index >= 4 and index % 2 else (0,)
    backward(model(inputs(index), *chosen).square().mean())


@pytest.mark.parametrize("micro_step", [other_branches_in_each_step, other_branches_on_each_rank, last_branch_first_used_late])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_parameters_unused_in_some_steps_or_on_some_ranks(ranks, micro_step, accumulation):
    # At stage 3 ranks that branch differently fetch the same: all branches at once.
    config = {"zero_optimization": {"leaf_module": {"classes": ["Branches"]}}}
    assert_parity(ranks, Training(Branches, micro_step, steps=4, accumulation=accumulation, config=config))


class OddShapes(nn.Module):
    """0-dim, empty, one-element and non-contiguous parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.nothing = nn.Parameter(torch.zeros(0))
        self.no_rows = nn.Linear(WIDTH, 0)
        self.single = nn.Parameter(torch.ones(1))
        self.transposed = nn.Parameter(torch.randn(7, WIDTH).t())
        self.channels_last = nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        image = x.repeat(1, 9).view(-1, 3, 6, 6)
        rest = self.nothing.sum() + self.no_rows(x).sum() + self.channels_last(image).square().mean()
        return (x @ self.transposed) * self.scale * self.single + rest


@pytest.mark.parametrize("bucket", [0, 64])
def test_parameters_of_odd_shapes(ranks, bucket):
    config = {"zero_optimization": {"reduce_bucket_size": bucket}}
    assert_parity(ranks, Training(OddShapes, squared_output, config=config))


class MixedDtypes(nn.Module):
    """An fp32 layer between fp64 ones."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH, dtype=torch.float64)
        self.middle = nn.Linear(WIDTH, WIDTH)
        self.last = nn.Linear(WIDTH, WIDTH, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.middle(torch.tanh(self.first(x.double())).float())).double())


@pytest.mark.parametrize("accumulation", [1, 2])
def test_parameters_of_several_dtypes(ranks, accumulation):
    assert_parity(ranks, Training(MixedDtypes, squared_output, accumulation=accumulation))


class WithBuffers(nn.Module):
    """A mean over time in a buffer, updated by each forward, and one that no state dict holds."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("forwards", torch.zeros((), dtype=torch.long))
        self.register_buffer("shift", torch.linspace(0, 1, WIDTH), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x + self.shift)


def test_buffers(ranks):
    assert_parity(ranks, Training(WithBuffers, squared_output))
