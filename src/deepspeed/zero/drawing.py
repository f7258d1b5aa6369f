"""Random values of parameters under construction, drawn fast.

Whatever code fills a large tensor with uniform or normal samples of torch's default generator on a CPU, gets the samples that
torch would have drawn, by the native kernel, in memory of huge pages. All ranks draw all of them: so all can read what they
construct, and each rank's generator goes on as after plain construction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..memory.pages import prefer_huge_pages
from ..native import draws

_ATEN = torch.ops.aten

_FILLS: dict[Any, tuple[Callable[..., bool], tuple[float, ...]]] = {
    _ATEN.uniform_.default: (draws.uniform_, (0.0, 1.0)),
    _ATEN.normal_.default: (draws.normal_, (0.0, 1.0)),
}
"""What draws in place of an operation of torch's, and the arguments that are left out."""


class FastDraws(TorchDispatchMode):
    """While it is entered, in this thread, ``uniform_`` and ``normal_`` are fast where that is possible."""

    def __torch_dispatch__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Draw in place of ``func``, or call it."""
        kwargs = kwargs or {}
        if func in _FILLS and type(args[0]) in (Tensor, nn.Parameter):
            out, *given = args
            fill, defaults = _FILLS[func]
            if out.is_contiguous():
                prefer_huge_pages(out)
            if not kwargs and fill(out, *given, *defaults[len(given) :]):
                return out
        return func(*args, **kwargs)
