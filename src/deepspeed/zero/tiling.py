"""Linear layers in tiles: with ZeRO stage 3, a layer that is too large to be whole at once.

The nouns: the weight [out_features, in_features] is cut into ``out_splits`` *rows* of ``in_splits`` *tiles* each, which are
linear layers that run one after the other. A row's tiles take the parts of the input and add up to a part of the output;
the last one has the row's bias. Each tile is gathered and released by itself, also inside a block that else would be
gathered as one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .gathered import GatheredParameters


class TiledLinear(nn.Module):
    """A linear layer in ``in_splits`` times ``out_splits`` tiles, of sizes that differ by one at most, larger ones first.

    Takes a tensor [..., in_features], with ``input_is_already_split`` a sequence of its ``in_splits`` parts; returns
    [..., out_features], without ``combine_out_splits`` a list of its ``out_splits`` parts. Tiles are made, and initialized,
    by ``linear_cls(in_features, out_features, bias=..., **kwargs)``. With ``init_linear`` its values are copied.

    Raises RuntimeError where there are fewer features than tiles.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        in_splits: int = 1,
        out_splits: int = 1,
        input_is_already_split: bool = False,
        combine_out_splits: bool = True,
        linear_cls: Callable[..., nn.Module] = nn.Linear,
        init_linear: nn.Module | None = None,
        **kwargs: Any,
    ):
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.in_sizes = _sizes(in_features, in_splits, "in")
        self.out_sizes = _sizes(out_features, out_splits, "out")
        self.input_is_already_split = input_is_already_split
        self.combine_out_splits = combine_out_splits
        self.tiles = nn.ModuleList(
            linear_cls(columns, rows, bias=bias and column == in_splits - 1, **kwargs)
            for rows in self.out_sizes
            for column, columns in enumerate(self.in_sizes)
        )
        if init_linear is not None:
            self.copy_params_from(init_linear)

    def forward(self, input_: Tensor | Sequence[Tensor]) -> Any:
        """The layer's output for ``input_``: see the class."""
        parts = self._parts(input_)
        return self._combined([_sum(_outputs(row, parts)) for row in self.rows()])

    def rows(self) -> Iterator[list[Any]]:
        """The tiles of each row."""
        tiles, size = list(self.tiles), len(self.in_sizes)
        return (tiles[start : start + size] for start in range(0, len(tiles), size))

    @torch.no_grad()
    def copy_params_from(self, other: nn.Module) -> None:
        """Copy weight and bias of ``other``, a linear layer of the same size. At stage 3 all ranks call it, and have rank
        0's values then. Raises ValueError where sizes differ, or one of them has no bias."""
        with GatheredParameters(other):
            weight: Any = other.weight
            bias: Any = other.bias
            self._check(weight, bias)
            start = 0
            for row, rows in zip(self.rows(), weight.split(list(self.out_sizes)), strict=True):
                for tile, values in zip(row, rows.split(list(self.in_sizes), dim=1), strict=True):
                    with GatheredParameters(tile, modifier_rank=0):
                        tile.weight.copy_(values)
                        if tile.bias is not None:
                            tile.bias.copy_(bias[start : start + len(rows)])
                start += len(rows)

    def extra_repr(self) -> str:
        """The sizes."""
        return f"in_features={self.in_features}, out_features={self.out_features}, in={self.in_sizes}, out={self.out_sizes}"

    def _parts(self, input_: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
        if not self.input_is_already_split:
            if not isinstance(input_, Tensor):
                raise ValueError("TiledLinear takes a tensor; give it input_is_already_split=True to take its parts")
            return input_.split(list(self.in_sizes), dim=-1)
        if isinstance(input_, Tensor) or [part.shape[-1] for part in input_] != list(self.in_sizes):
            found = tuple(input_.shape) if isinstance(input_, Tensor) else [part.shape[-1] for part in input_]
            raise ValueError(f"TiledLinear takes an input in parts of {list(self.in_sizes)} features, got {found}")
        return input_

    def _combined(self, parts: list[Tensor]) -> Tensor | list[Tensor]:
        return torch.cat(parts, dim=-1) if self.combine_out_splits else parts

    def _check(self, weight: Tensor, bias: Tensor | None) -> None:
        if tuple(weight.shape) != (self.out_features, self.in_features):
            raise ValueError(
                f"TiledLinear has a weight of {self.out_features} x {self.in_features}; it cannot be copied from one of "
                f"{' x '.join(map(str, weight.shape))}"
            )
        last: Any = self.tiles[-1]
        if (last.bias is None) != (bias is None):
            raise ValueError("TiledLinear can only be copied from a linear layer that has a bias too, or none either")


class TiledLinearReturnBias(TiledLinear):
    """A :class:`TiledLinear` of layers that return their bias beside their output, instead of adding it: so does it."""

    def forward(self, input_: Tensor | Sequence[Tensor]) -> Any:
        """The output without bias, and the bias (None where there is none), combined or in parts as the output is."""
        parts = self._parts(input_)
        outputs, biases = [], []
        for row in self.rows():
            row_outputs, row_biases = zip(*_outputs(row, parts), strict=True)
            outputs.append(_sum(iter(row_outputs)))
            biases.append(row_biases[-1])
        return self._combined(outputs), None if biases[0] is None else self._combined(biases)


def _sizes(features: int, splits: int, which: str) -> tuple[int, ...]:
    if not 1 <= splits <= features:
        most = f"{which}_features {features}"
        raise RuntimeError(f"{which}_splits of a TiledLinear is at least 1 and at most {most}, got {splits}")
    return tuple(features // splits + (index < features % splits) for index in range(splits))


def _outputs(row: list[Any], parts: Sequence[Tensor]) -> Iterator[Any]:
    """What the tiles make of their parts of the input. Each has a view of its own: a tile's backward is over, and its
    weight is released, when the gradient of its input is there, which rows that share one only have together."""
    for tile, part in zip(row, parts, strict=True):
        yield tile(part.view_as(part))


def _sum(values: Iterator[Tensor]) -> Tensor:
    total = next(values)
    for value in values:
        total = total + value
    return total
