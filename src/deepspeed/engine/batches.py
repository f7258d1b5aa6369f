"""From a batch to a loss that can be differentiated."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor


def loss_of(model: Callable[..., Any], batch: Any) -> Tensor:
    """Run ``model`` on ``batch``: its arguments (tuple or list), keywords (mapping) or only argument.

    The loss is the output itself where it is a tensor, else its ``loss``, else its first item.
    """
    if isinstance(batch, Mapping):
        output = model(**batch)
    elif isinstance(batch, (list, tuple)):
        output = model(*batch)
    else:
        output = model(batch)
    if isinstance(output, Tensor):
        return output
    named = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    loss: Tensor = named if named is not None else output[0]
    return loss


def check_loss(loss: object) -> None:
    """Raise ValueError where ``loss`` is not a scalar tensor with a gradient."""
    if not isinstance(loss, Tensor):
        raise ValueError(f"engine.backward(loss) needs a tensor, got {type(loss).__name__}")
    if loss.numel() != 1:
        raise ValueError(f"engine.backward(loss) needs a scalar, got shape {tuple(loss.shape)}: reduce it, as by .mean()")
    if not loss.requires_grad:
        raise ValueError(
            "engine.backward(loss): the loss has no gradient; it does not depend on a trainable parameter, or was "
            "computed under torch.no_grad()"
        )
