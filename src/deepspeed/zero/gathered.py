"""Whole parameters for a while, outside the modules that compute with them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any

from torch import nn

from .external import register_external_parameter
from .released import Home, home_of


class GatheredParameters:
    """A context in which sharded parameters are whole; all ranks enter it with the same ones.

    ``params`` is a parameter, or an iterable (nested ones too) in which anything that is no sharded parameter is passed
    over; duplicates and the order do not matter. With ``modifier_rank``, the values that this rank has at the end of the
    context become everyone's, masters included; without it (None), changes to a sharded parameter are lost. With
    ``fwd_module``, a module of the same model, the parameters are also made whole whenever that module runs from now
    on. ``enabled`` False does nothing.

    An exception inside leaves the parameters as they were before.
    """

    def __init__(
        self,
        params: Any,
        modifier_rank: int | None = None,
        fwd_module: nn.Module | None = None,
        enabled: bool = True,
    ):
        self._parameters = _sharded(params) if enabled else []
        self._homes: list[Home] = list({id(home): home for _, home in self._parameters}.values())
        self._modifier_rank = modifier_rank
        if fwd_module is not None:
            for parameter, _ in self._parameters:
                register_external_parameter(fwd_module, parameter)

    def __enter__(self) -> None:
        for home in self._homes:
            home.hold()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._modifier_rank is not None and error is None:
            for parameter, home in self._parameters:
                home.keep(parameter, source=self._modifier_rank)
        for home in self._homes:
            home.let_go()


def _sharded(params: Any) -> list[tuple[nn.Parameter, Home]]:
    """The sharded parameters in ``params`` with their homes, in an order that is the same on all ranks."""
    found = {id(p): (p, home) for p in _flattened(params) if (home := home_of(p)) is not None}
    return sorted(found.values(), key=lambda pair: pair[0].ds_id)


def _flattened(params: Any) -> Iterable[Any]:
    if isinstance(params, nn.Module):
        yield from params.parameters()
    elif isinstance(params, Mapping):
        yield from _flattened(params.values())
    elif isinstance(params, Iterable) and not hasattr(params, "untyped_storage"):
        for item in params:
            yield from _flattened(item)
    else:
        yield params
