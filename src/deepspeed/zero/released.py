"""A parameter whose values are not here: each rank has its slice, and nobody the whole.

While a parameter is released its class is :class:`ReleasedParameter` and its shape ``(0,)``; it is an ordinary
``nn.Parameter`` again while it is whole. So computing with a released one can be noticed, at no cost to computing with
a whole one. What autograd saved of it is noticed by its version: while it is released, that is none that was ever saved.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from functools import partial
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class ZeroParamStatus(Enum):
    """Whether a parameter's values are here. Read it as ``parameter.ds_status``."""

    AVAILABLE = 1
    NOT_AVAILABLE = 2
    INFLIGHT = 3


class Home(Protocol):
    """Where a sharded parameter's values come from: its unit, or the flat parameters of which it is a resident."""

    def hold(self) -> None:
        """Make the values be here until ``let_go``. Called on all ranks."""

    def let_go(self) -> None:
        """Take back a ``hold``; the last one lets the values go."""

    def touched(self, parameter: nn.Parameter, operation: str) -> None:
        """Make ``parameter`` whole, which ``operation`` needs while it is released, or raise."""

    def keep(self, parameter: nn.Parameter, *, source: int | None) -> None:
        """Make the values that ``parameter`` has now on rank ``source`` (the same on all ranks where None) the ones that
        the model trains on. Called on all ranks, while the values are held."""

    def give_up(self, parameter: nn.Parameter) -> None:
        """Leave ``parameter``, whose values are held, to another home."""


_IDENTIFIERS = itertools.count()
"""Sharded parameters are made in the same order on all ranks: a number is the same parameter everywhere."""

RELEASED_VERSION = 1 << 31
"""Added to its identifier, the version of a parameter while it is released: what autograd saved of it then cannot be
used, and torch's error tells by the number which parameter it was."""

HOME = "ds_home"
"""The attribute of a sharded parameter that is its home."""

_COMPUTED = ("H", "T", "data", "imag", "mH", "mT", "real")
"""Properties of a tensor that are made of its values."""

_METHODS = (
    "__deepcopy__", "__hash__", "__reduce_ex__", "__repr__", "_is_view", "data_ptr", "detach", "dim", "element_size",
    "is_contiguous", "is_complex", "is_floating_point", "is_inference", "is_shared", "is_signed", "ndimension", "nelement",
    "numel", "register_hook", "register_post_accumulate_grad_hook", "requires_grad_", "retain_grad", "size",
    "storage_offset", "stride", "untyped_storage",
)  # fmt: skip


def _harmless() -> frozenset[Any]:
    properties = [getattr(torch.Tensor, name) for name in dir(torch.Tensor) if name not in _COMPUTED]
    kinds = ("__get__", "__set__", "__delete__")
    accessors = [getattr(p, kind) for p in properties if hasattr(type(p), "__set__") for kind in kinds if hasattr(p, kind)]
    methods = [getattr(torch.Tensor, name) for name in _METHODS if hasattr(torch.Tensor, name)]
    functions: list[Any] = [torch.is_complex, torch.is_floating_point, torch.is_inference, torch.is_tensor]
    return frozenset([*accessors, *methods, *functions, torch._has_compatible_shallow_copy_type])


HARMLESS = _harmless()
"""What asks about a parameter without computing with its values."""


MOVES = frozenset(getattr(torch.Tensor, name) for name in ("to", "cpu", "cuda", "float", "double", "half", "bfloat16"))
"""What moves or converts a parameter. Where that changes nothing, as in most calls of ``Module.to``, it is harmless."""

SET_DATA = torch.Tensor.data.__set__  # type: ignore[attr-defined]
"""What ``Module.to`` does with the parameter that it has moved."""


class ReleasedParameter(nn.Parameter):
    """The class of a parameter while it is released."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy that has no values and no home: an error where it is used."""
        with torch._C.DisableTorchFunctionSubclass():
            return super().__deepcopy__(memo)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Let questions about the parameter through; make it whole, or raise, for anything else."""
        keywords = dict(kwargs or {})
        if func in MOVES and isinstance(args[0], ReleasedParameter):
            with torch._C.DisableTorchFunctionSubclass():
                moved = func(*args, **keywords)
                if _is_like(args[0], moved):
                    return moved
        if func not in HARMLESS and not (func == SET_DATA and _is_like(*args)):
            for parameter in _released_among([*args, *keywords.values()]):
                touch(parameter, _name_of(func))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **keywords)


def home_of(parameter: object) -> Home | None:
    """The home of a sharded parameter, None for anything else."""
    found: Home | None = getattr(parameter, HOME, None)
    return found


def shape_of(parameter: nn.Parameter) -> torch.Size:
    """The shape that ``parameter`` has when it is whole."""
    found: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return found


def touch(parameter: nn.Parameter, operation: str) -> None:
    """Make a released ``parameter`` whole for ``operation``. Raises RuntimeError where that is not possible."""
    home = home_of(parameter)
    if home is None:
        raise RuntimeError(
            f"{operation} was called on a copy of a sharded parameter, which has no values: copy it inside "
            "deepspeed.zero.GatheredParameters"
        )
    home.touched(parameter, operation)


def release(parameter: nn.Parameter) -> None:
    """Take the values out of ``parameter``."""
    described = parameter.__dict__
    if type(parameter) is not ReleasedParameter:
        described["ds_version"] = parameter._version
        _set_version(parameter, RELEASED_VERSION + _identifier(parameter))
        parameter.data = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
        parameter.__class__ = ReleasedParameter
    described["ds_status"] = ZeroParamStatus.NOT_AVAILABLE


def expose(parameter: nn.Parameter, values: Tensor) -> None:
    """Give ``parameter`` its ``values`` (of its whole shape) as its memory."""
    described = parameter.__dict__
    if type(parameter) is ReleasedParameter:
        parameter.__class__ = nn.Parameter  # type: ignore[assignment]
        _set_version(parameter, described.pop("ds_version"))
        described["ds_status"] = ZeroParamStatus.AVAILABLE
    parameter.data = values


def missed_by_autograd(error: BaseException) -> int | None:
    """The ``ds_id`` of the released parameter whose values backward wanted, where ``error`` is autograd's about that."""
    found = re.search(r"is at version (\d+); expected version", str(error))
    version = int(found.group(1)) if found else 0
    return version - RELEASED_VERSION if version >= RELEASED_VERSION else None


def describe(parameter: nn.Parameter, home: Home, *, shape: tuple[int, ...], shards: int) -> None:
    """Give ``parameter`` its home, and the attributes by which integrations recognize a sharded parameter."""
    described, numel = parameter.__dict__, prod(shape)
    _identifier(parameter)
    described[HOME] = home
    described["ds_shape"] = torch.Size(shape)
    described["ds_numel"] = numel
    described["ds_status"] = ZeroParamStatus.AVAILABLE
    described["partition_numel"] = partial(int, -(-numel // shards))


def forget(parameter: nn.Parameter) -> None:
    """Take away what ``describe`` gave; the identifier stays, for the next home."""
    for name in (HOME, "ds_shape", "ds_numel", "ds_status", "partition_numel"):
        parameter.__dict__.pop(name, None)


def _identifier(parameter: nn.Parameter) -> int:
    if "ds_id" not in parameter.__dict__:
        parameter.__dict__["ds_id"] = next(_IDENTIFIERS)
    found: int = parameter.__dict__["ds_id"]
    return found


def _set_version(parameter: nn.Parameter, version: int) -> None:
    """Set the version that autograd compares with the one at which it saved ``parameter``, or a view of it."""
    try:
        torch._C._autograd._unsafe_set_version_counter((parameter,), (version,))
    except TypeError:  # torch < 2.7 takes one tensor.
        torch._C._autograd._unsafe_set_version_counter(parameter, version)  # type: ignore[arg-type]


def _is_like(parameter: Tensor, other: Tensor) -> bool:
    """Whether ``other`` has no values either, and the same dtype and device as the released ``parameter``."""
    return (other.numel(), other.dtype, other.device) == (0, parameter.dtype, parameter.device)


def _name_of(function: Any) -> str:
    """The name of an operation, or of the property that an accessor belongs to."""
    accessed = getattr(function, "__self__", function) if function.__name__ in ("__get__", "__set__") else function
    return str(accessed.__name__)


def _released_among(values: Sequence[Any]) -> Iterator[ReleasedParameter]:
    for value in values:
        if isinstance(value, ReleasedParameter):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _released_among(value)
