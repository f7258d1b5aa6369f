"""Models that are constructed in all the ways that models are."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations


class Tied(nn.Module):
    """Two modules with one parameter; what the second had before is gone."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8, padding_idx=3)
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Any:
        return self.head(self.embedding(tokens))


class Applied(nn.Module):
    """Initialized by a function for all modules, when these are complete."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 9)
        self.rest = nn.Sequential(*[nn.Linear(9, 9) for _ in range(6)], nn.LayerNorm(9))
        self.apply(self.initialize)

    @staticmethod
    def initialize(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            module.weight.data.normal_(0, 0.02)
            module.bias.data.zero_()


class Rewritten(nn.Module):
    """Parameters of complete modules are written by functions of torch, of nn.init, and by assignment."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(6, 6) for _ in range(4))
        nn.init.xavier_uniform_(self.a.weight, gain=2)
        nn.init.orthogonal_(self.b.weight)
        nn.init.trunc_normal_(self.c.weight, std=0.02)
        with torch.no_grad():
            self.a.weight[0].copy_(torch.arange(6.0))
            self.c.weight.mul_(2).add_(self.b.weight)
            self.d.weight.copy_(torch.eye(6))
            self.d.bias += 1
        self.b.weight.data = torch.randn(6, 6)
        self.a.bias.data[2:] = self.d.weight.data[0, 2:]
        for name, parameter in self.named_parameters():
            if name.endswith("weight"):
                parameter.data.mul_(1 / math.sqrt(parameter.shape[1] * parameter.dim()))


class Reparametrized(nn.Module):
    """Parameters that are computed from others."""

    def __init__(self) -> None:
        super().__init__()
        self.normed = parametrizations.weight_norm(nn.Linear(8, 8))
        self.spectral = parametrizations.spectral_norm(nn.Linear(8, 8))
        self.orthogonal = nn.Linear(8, 8)
        parametrizations.orthogonal(self.orthogonal)

    def forward(self, x: Tensor) -> Any:
        return self.orthogonal(self.spectral(self.normed(x)))


class Collected(nn.Module):
    """Parameters in lists and dictionaries, some of which grow."""

    def __init__(self) -> None:
        super().__init__()
        self.several = nn.ParameterList(nn.Parameter(torch.randn(4, 4)) for _ in range(3))
        self.named = nn.ParameterDict({"one": nn.Parameter(torch.randn(4, 4))})
        self.several.append(nn.Parameter(torch.ones(3, 3)))
        self.named["two"] = nn.Parameter(torch.randn(5, 4))
        self.number = nn.Parameter(torch.tensor(1.5))
        self.nothing = nn.Parameter(torch.empty(0))


class Replaced(nn.Module):
    """Parameters that are taken away and replaced."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.first.bias = None
        self.second.weight = nn.Parameter(self.first.weight.detach().clone() * 3, requires_grad=False)
        del self.third.bias
        self.third.register_parameter("bias", None)
        self.register_parameter("none", None)


class Buffered(nn.Module):
    """Buffers, one of which is computed from a parameter, and a number that is."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)
        self.linear = nn.Linear(8, 8)
        self.register_buffer("sums", self.linear.weight.sum(1))
        self.scale = self.linear.weight.detach().norm().item()
        self.scaled = nn.Parameter(self.linear.weight.detach() * self.scale)


class Counting(nn.Module):
    """Asks for shapes of complete modules, as constructors do that print their size."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(7, 3)
        self.embedding = nn.Embedding(5, 7)
        assert sum(p.numel() for p in self.parameters()) == 7 * 3 + 3 + 35
        assert self.linear.weight.shape == (3, 7) and self.linear.weight.size(1) == 7 and len(self.linear.weight) == 3
        assert self.embedding.weight.data.shape == (5, 7) and self.embedding.weight.ndim == 2
        self.out = nn.Linear(*self.embedding.weight.shape)


class Small(nn.Module):
    """Parameters that stay whole, some rewritten when their module is complete."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(3)
        self.linear = nn.Linear(3, 3)
        nn.init.normal_(self.norm.weight)
        self.linear.bias.data.uniform_()


def clones() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return nn.TransformerEncoder(layer, 3)


def copies() -> nn.Module:
    linear = nn.Linear(8, 8)
    model = nn.ModuleList([linear, *(copy.deepcopy(linear) for _ in range(5))])
    model.append(copy.deepcopy(model))
    with torch.no_grad():
        model[1].weight.mul_(2)
    return model


def listed() -> nn.Module:
    return nn.ModuleList([nn.Linear(8, 8) for _ in range(7)])


def reused() -> nn.Module:
    linear = nn.Linear(8, 8)
    return nn.Sequential(linear, nn.ReLU(), linear, nn.Sequential(linear))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "tied": Tied,
    "applied": Applied,
    "rewritten": Rewritten,
    "reparametrized": Reparametrized,
    "collected": Collected,
    "replaced": Replaced,
    "buffered": Buffered,
    "counting": Counting,
    "small": Small,
    "clones": clones,
    "copies": copies,
    "listed": listed,
    "reused": reused,
    "attention": lambda: nn.MultiheadAttention(8, 2),
    "attention with other keys": lambda: nn.MultiheadAttention(8, 2, kdim=4, vdim=6, add_bias_kv=True),
    "recurrent": lambda: nn.LSTM(8, 8, 2, bidirectional=True),
    "transformer": lambda: nn.Transformer(8, 2, 1, 1, 16, batch_first=True),
    "convolutional": lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ConvTranspose2d(8, 3, 3)),
    "one module": lambda: nn.Linear(8, 8),
}
