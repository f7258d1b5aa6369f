"""The batch-size triangle: train_batch_size = micro-batch x accumulation steps x data-parallel ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .errors import Problem, shown
from .section import integral

TRAIN = "train_batch_size"
MICRO = "train_micro_batch_size_per_gpu"
STEPS = "gradient_accumulation_steps"
BATCH_KEYS = (TRAIN, MICRO, STEPS)


@dataclass(frozen=True)
class BatchSizes:
    """Samples of an optimizer step over all ranks, samples of one forward on one rank, forwards of a step."""

    train: int
    micro: int
    accumulation: int


def whole_number(value: Any) -> int | None:
    """``value`` as a positive integer, None where it is none. 8, 8.0, "8" and "8e0" are."""
    try:
        number = integral(value)
    except ValueError:
        return None
    return number if isinstance(number, int) and number > 0 else None


def solve_batch_sizes(given: Mapping[str, Any], *, world_size: int) -> BatchSizes | list[Problem]:
    """The three batch sizes from those that are ``given`` (any of them), or what is wrong with them.

    A missing size follows from the other two; accumulation is 1 and the micro-batch is 1 where nothing
    determines them. Nothing is rounded: sizes that do not divide are problems.
    """
    problems = []
    numbers: dict[str, int] = {}
    for key in BATCH_KEYS:
        if given.get(key) is None:
            continue
        number = whole_number(given[key])
        if number is None:
            problems.append(Problem(key, f"found {shown(given[key])}, expected a whole number of at least 1."))
        else:
            numbers[key] = number
    return problems or _solve(numbers, world_size)


def explain_solution(key: str, batch: BatchSizes, given: Mapping[str, Any], world_size: int) -> str | None:
    """The arithmetic by which ``key`` follows from the ``given`` sizes; None where it was given or is its default."""
    if key in given:
        return None
    if key == TRAIN:
        return f"{batch.micro} x {batch.accumulation} x {_ranks(world_size)}"
    if key == MICRO and TRAIN in given:
        return f"{batch.train} / ({STEPS} {batch.accumulation} x {_ranks(world_size)})"
    if key == STEPS and TRAIN in given and MICRO in given:
        return f"{batch.train} / ({MICRO} {batch.micro} x {_ranks(world_size)})"
    return None


def _solve(numbers: Mapping[str, int], world_size: int) -> BatchSizes | list[Problem]:
    train, micro, steps = (numbers.get(key) for key in BATCH_KEYS)
    if train is None:
        micro, steps = micro or 1, steps or 1
        return BatchSizes(micro * steps * world_size, micro, steps)
    if micro is not None and steps is not None:
        product = micro * steps * world_size
        if train == product:
            return BatchSizes(train, micro, steps)
        sentence = (
            f"found {train}, but {MICRO} {micro} x {STEPS} {steps} x {_ranks(world_size)} = {product}. "
            f"Set {TRAIN} to {product}, or leave one of the three out and it is solved from the others."
        )
        return [Problem(TRAIN, sentence)]
    known, size = (MICRO, micro) if micro is not None else (STEPS, steps or 1)
    unit = size * world_size
    other, rest = divmod(train, unit)
    if rest or not other:
        nearest = f"{train - rest} or {train - rest + unit}" if other else f"{unit}"
        sentence = (
            f"found {train}, which is not a multiple of {known} {size} x {_ranks(world_size)} = {unit}. "
            f"Set it to {nearest}, or change the other sizes."
        )
        return [Problem(TRAIN, sentence)]
    return BatchSizes(train, size, other) if micro is not None else BatchSizes(train, other, size)


def _ranks(world_size: int) -> str:
    return "1 data-parallel rank" if world_size == 1 else f"{world_size} data-parallel ranks"
