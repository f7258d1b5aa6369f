"""The hook by which a parameter's gradient comes to a reducer."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


class Arrival:
    """Takes a parameter's gradient, as soon as backward has accumulated it, to ``receive``."""

    def __init__(self, receive: Callable[[Tensor], None]):
        self._receive = receive

    def __call__(self, parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None, "autograd calls this hook with a gradient in place"
        self._receive(gradient)


def is_reduced(parameter: Tensor) -> bool:
    """Whether a reducer takes this parameter's gradients."""
    hooks = getattr(parameter, "_post_accumulate_grad_hooks", None) or {}
    return any(isinstance(hook, Arrival) for hook in hooks.values())
