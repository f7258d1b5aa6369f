"""A parameter whose values are not here: each rank has its slice, and nobody the whole.

While a parameter is released its class is :class:`ReleasedParameter` and its shape ``(0,)``; it is an ordinary
``nn.Parameter`` again while it is whole. So computing with a released one can be noticed, at no cost to computing with
a whole one. The same holds for its ``data`` and ``detach()``, which are :class:`ReleasedValues`. What autograd saved of
it is noticed by its version: while it is released, that is none that was ever saved.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
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

    ranks_agree: bool
    """Whether all ranks certainly have the same values: each rank may have written its own into what is never released."""

    def hold(self) -> None:
        """Make the values be here until ``let_go``. Called on all ranks."""

    def let_go(self) -> None:
        """Take back a ``hold``; the last one lets the values go."""

    def touched(self, parameter: nn.Parameter, operation: str) -> None:
        """Make ``parameter`` whole, which ``operation`` needs while it is released, or raise."""

    def copied(self, parameter: nn.Parameter) -> nn.Parameter:
        """A copy of ``parameter``, which is released, or raise."""

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

_COMPUTED = ("H", "T", "imag", "mH", "mT", "real")
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
"""What moves or converts a parameter. Where that changes nothing, as in most calls of ``Module.to``, it is harmless; so is
padding by nothing, which Transformers does to tie biases."""


_SIZES = ("__len__", "dim", "ndim", "ndimension", "nelement", "numel", "shape", "size", "stride")
SIZES = frozenset(getattr(m, "__get__", m) if hasattr(type(m), "__set__") else m for m in (getattr(Tensor, n) for n in _SIZES))
"""What asks for sizes. A home may have them answered as if the parameter were whole."""

ALIASES = frozenset((Tensor.detach, torch.detach, Tensor.data.__get__))  # type: ignore[attr-defined]
"""What gives the values of a parameter without its gradient."""

_SET_DATA = Tensor.data.__set__  # type: ignore[attr-defined]


def _intercept(
    kind: type, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
) -> Any:
    """Let questions about a parameter, or its values, through; make it whole, or raise, for anything else."""
    return _answer(func, args, kwargs or {})


class ReleasedParameter(nn.Parameter):
    """The class of a parameter while it is released."""

    __torch_function__: Any = classmethod(_intercept)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """What the home makes of it."""
        if id(self) not in memo:
            memo[id(self)] = _home(self, "deepcopy").copied(self)
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Raise: there are no values to save."""
        touch(self, "pickle")
        return self.__reduce_ex__(protocol)


class ReleasedValues(Tensor):
    """What ``data`` and ``detach()`` of a released ``parameter`` give: whoever computes with it gets the values."""

    parameter: nn.Parameter

    __torch_function__: Any = classmethod(_intercept)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy of the values, where they can be had."""
        return self.clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Those of the values, where they can be had."""
        touch(self.parameter, "pickle")
        return self.parameter.detach().__reduce_ex__(protocol)


def _answer(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    subject = args[0] if args else None
    owner = _owner(subject)
    if owner is not None and func in SIZES and getattr(home_of(owner), "shows_sizes", False):
        return func(torch.empty(shape_of(owner), dtype=owner.dtype, device="meta"), *args[1:], **kwargs)
    if func is nn.functional.pad and owner is not None and not any(args[1]):
        return subject
    if func in MOVES and owner is not None:
        with torch._C.DisableTorchFunctionSubclass():
            moved = func(*args, **kwargs)
            if (moved.dtype, moved.device) == (owner.dtype, owner.device):
                return moved
    elif func in ALIASES and isinstance(subject, ReleasedParameter):
        with torch._C.DisableTorchFunctionSubclass():
            alias = func(*args, **kwargs).as_subclass(ReleasedValues)
        alias.parameter = subject
        return alias
    if func not in HARMLESS or (func == _SET_DATA and _owner(args[1]) is not subject):
        name = _name_of(func)
        args, kwargs = _with_values(list(args), name), {key: _with_values(value, name) for key, value in kwargs.items()}
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **kwargs)


def _with_values(value: Any, operation: str) -> Any:
    """``value`` with what is released in it made whole for ``operation``."""
    if isinstance(value, (list, tuple)) and any(isinstance(item, (Tensor, list, tuple)) for item in value):
        items = [_with_values(item, operation) for item in value]
        return type(value)(items) if type(value) in (list, tuple) else items
    owner = _owner(value)
    if owner is None:
        return value
    if isinstance(owner, ReleasedParameter):
        touch(owner, operation)
    return value if value is owner else owner.detach()


def _owner(value: Any) -> nn.Parameter | None:
    """The parameter that ``value`` is or belongs to, where it is released or was when ``value`` was made."""
    if isinstance(value, ReleasedValues):
        return value.parameter
    return value if isinstance(value, ReleasedParameter) else None


def home_of(parameter: object) -> Home | None:
    """The home of a sharded parameter, None for anything else."""
    found: Home | None = getattr(parameter, HOME, None)
    return found


def shape_of(parameter: nn.Parameter) -> torch.Size:
    """The shape that ``parameter`` has when it is whole."""
    found: torch.Size | None = getattr(parameter, "ds_shape", None)
    return parameter.shape if found is None else found


def touch(parameter: nn.Parameter, operation: str) -> None:
    """Make a released ``parameter`` whole for ``operation``. Raises RuntimeError where that is not possible."""
    _home(parameter, operation).touched(parameter, operation)


def _home(parameter: nn.Parameter, operation: str) -> Home:
    home = home_of(parameter)
    if home is None:
        raise RuntimeError(
            f"{operation} was called on a copy of a sharded parameter, which has no values: copy it inside "
            "deepspeed.zero.GatheredParameters"
        )
    return home


def release(parameter: nn.Parameter) -> None:
    """Take the values out of ``parameter``."""
    described = parameter.__dict__
    if type(parameter) is not ReleasedParameter:
        described["ds_version"] = parameter._version
        _set_version(parameter, RELEASED_VERSION + _identifier(parameter))
        parameter.__class__ = ReleasedParameter
    _set_data(parameter, torch.empty(0, dtype=parameter.dtype, device=parameter.device))
    described["ds_status"] = ZeroParamStatus.NOT_AVAILABLE


def expose(parameter: nn.Parameter, values: Tensor) -> None:
    """Give ``parameter`` its ``values`` (of its whole shape) as its memory."""
    described = parameter.__dict__
    if type(parameter) is ReleasedParameter:
        parameter.__class__ = nn.Parameter  # type: ignore[assignment]
        _set_version(parameter, described.pop("ds_version"))
        described["ds_status"] = ZeroParamStatus.AVAILABLE
    _set_data(parameter, values)


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
    described["ds_active_sub_modules"] = set()  # for who empties it: it is homes that know who holds them
    described["partition_numel"] = partial(int, -(-numel // shards))


def forget(parameter: nn.Parameter) -> None:
    """Take away what ``describe`` gave; the identifier stays, for the next home."""
    for name in (HOME, "ds_shape", "ds_numel", "ds_status", "ds_active_sub_modules", "partition_numel"):
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


def _name_of(function: Any) -> str:
    """The name of an operation, or of the property that an accessor belongs to."""
    accessed = getattr(function, "__self__", function) if function.__name__ in ("__get__", "__set__") else function
    return str(accessed.__name__)


def _set_data(parameter: nn.Parameter, values: Tensor) -> None:
    with torch._C.DisableTorchFunctionSubclass():
        parameter.data = values
