"""All ranks succeed, or all fail: what one rank alone finds wrong is raised on every rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

Result = TypeVar("Result")


class Ranks(Protocol):
    """Who agrees: a communicator, or one program alone."""

    rank: int
    size: int

    def gather_objects(self, value: object, *, purpose: str = "") -> list[Any]:
        """Every rank's ``value``, in rank order."""


def on_all_ranks(
    action: Callable[[], Result], communicator: Ranks, *, what: str, error: type[Exception] = RuntimeError
) -> Result:
    """``action()`` on every rank; it must not communicate. Called on all ranks.

    Where it raises on some, these raise what they found, and the others an ``error`` that says on which rank ``what``
    failed and why: nobody goes on to wait for a rank that does not come.
    """
    failure: Exception | None = None
    try:
        result = action()
    except Exception as found:
        failure = found
    reason = None if failure is None else f"{type(failure).__name__}: {failure}"
    reasons = communicator.gather_objects(reason, purpose=f"agreement on {what}")
    if failure is not None:
        raise failure
    for rank, reason in enumerate(reasons):
        if reason is not None:
            raise error(f"{what} failed on rank {rank}: {reason}")
    return result
