"""Learning-rate schedules.

A schedule is a function of the *iteration*: the number of times that ``step`` was called. Iteration 0 is in force from
construction on, so the first optimizer step runs at the schedule's first value. Each is stepped once per optimizer step.

Sources: Smith, "Cyclical Learning Rates" (2017) and "A disciplined approach to neural network hyper-parameters" (2018)
for LRRangeTest and OneCycle; Goyal et al. (2017) for warm-up; Loshchilov & Hutter, "SGDR" (2017) for the cosine.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .arguments import checked_arguments, closest

logger = logging.getLogger("DeepSpeed")

PerGroup = float | Sequence[float]
"""One value for all parameter groups, or one for each."""


class Schedule:
    """Sets the learning rates of ``optimizer``'s parameter groups by iteration.

    ``last_batch_iteration`` is the iteration less one: -1 before the first ``step``.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, last_batch_iteration: int = -1):
        self.optimizer = optimizer
        self.last_batch_iteration = int(last_batch_iteration)
        self._last_lr: list[float] = []
        self._apply()

    @property
    def iteration(self) -> int:
        """How many times the schedule has been stepped."""
        return self.last_batch_iteration + 1

    def get_lr(self) -> list[float]:
        """The learning rate of each parameter group at the present iteration."""
        raise NotImplementedError

    def get_last_lr(self) -> list[float]:
        """The learning rates in force, also before the first ``step``."""
        return list(self._last_lr)

    def step(self, last_batch_iteration: int | None = None) -> None:
        """Go to the next iteration, or to the one after ``last_batch_iteration``."""
        self.last_batch_iteration = self.iteration if last_batch_iteration is None else int(last_batch_iteration)
        self._apply()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"last_batch_iteration": self.last_batch_iteration}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from what ``state_dict`` returned."""
        self.last_batch_iteration = int(state_dict["last_batch_iteration"])
        self._apply()

    def _apply(self) -> None:
        self._last_lr = self.get_lr()
        for group, lr in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = lr

    def _per_group(self, name: str, value: PerGroup) -> list[float]:
        groups = len(self.optimizer.param_groups)
        if not isinstance(value, (list, tuple)):
            return [float(value)] * groups  # type: ignore[arg-type]
        if len(value) != groups:
            raise ValueError(f"{name} has {len(value)} values, the optimizer {groups} parameter groups: give one for each")
        return [float(item) for item in value]


class LRRangeTest(Schedule):
    """``min_lr * (1 + step_rate * iteration / step_size)``, in stairs if asked: to find the largest usable rate."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        lr_range_test_min_lr: PerGroup = 1e-3,
        lr_range_test_step_size: int = 2000,
        lr_range_test_step_rate: float = 1.0,
        lr_range_test_staircase: bool = False,
        last_batch_iteration: int = -1,
    ):
        self.optimizer = optimizer
        _positive("lr_range_test_step_size", lr_range_test_step_size)
        self._minimum = self._per_group("lr_range_test_min_lr", lr_range_test_min_lr)
        self._step_size = lr_range_test_step_size
        self._step_rate = lr_range_test_step_rate
        self._staircase = lr_range_test_staircase
        super().__init__(optimizer, last_batch_iteration)

    def get_lr(self) -> list[float]:
        """The learning rate of each parameter group at the present iteration."""
        interval = self.iteration / self._step_size
        if self._staircase:
            interval = math.floor(interval)
        return [minimum * (1 + self._step_rate * interval) for minimum in self._minimum]


class OneCycle(Schedule):
    """Up from ``cycle_min_lr`` to ``cycle_max_lr`` in ``cycle_first_step_size`` iterations, down again in
    ``cycle_second_step_size`` (the same where None), then ``cycle_min_lr / (1 + decay_lr_rate * interval)`` with an
    interval of ``decay_step_size`` iterations (0: no decay).

    With ``cycle_momentum`` the momentum (or Adam's first beta) goes the other way, between ``cycle_max_mom`` and
    ``cycle_min_mom``, and decays by ``cycle_max_mom * (1 + decay_mom_rate * interval)``. A stair count above 0 turns the
    phase into that many stairs.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        cycle_min_lr: PerGroup,
        cycle_max_lr: PerGroup,
        decay_lr_rate: float = 0.0,
        cycle_first_step_size: int = 2000,
        cycle_second_step_size: int | None = None,
        cycle_first_stair_count: int = 0,
        cycle_second_stair_count: int | None = None,
        decay_step_size: int = 0,
        cycle_momentum: bool = True,
        cycle_min_mom: float = 0.8,
        cycle_max_mom: float = 0.9,
        decay_mom_rate: float = 0.0,
        last_batch_iteration: int = -1,
    ):
        self.optimizer = optimizer
        second = cycle_first_step_size if cycle_second_step_size is None else cycle_second_step_size
        _positive("cycle_first_step_size", cycle_first_step_size)
        _positive("cycle_second_step_size", second)
        self._lr = list(
            zip(self._per_group("cycle_min_lr", cycle_min_lr), self._per_group("cycle_max_lr", cycle_max_lr), strict=True)
        )
        self._sizes = cycle_first_step_size, second
        second_stairs = cycle_first_stair_count if cycle_second_stair_count is None else cycle_second_stair_count
        self._stairs = cycle_first_stair_count, second_stairs
        self._decay_step_size = decay_step_size
        self._decay_rates = decay_lr_rate, decay_mom_rate
        self._momentum = (cycle_min_mom, cycle_max_mom) if cycle_momentum else None
        if cycle_momentum and not all("betas" in g or "momentum" in g for g in optimizer.param_groups):
            logger.warning("OneCycle: %s has no momentum to cycle", type(optimizer).__name__)
        super().__init__(optimizer, last_batch_iteration)

    def get_lr(self) -> list[float]:
        """The learning rate of each parameter group at the present iteration."""
        height, decay = self._height(), 1 + self._decay_rates[0] * self._decay_interval()
        return [(low + (high - low) * height) / decay for low, high in self._lr]

    def get_mom(self) -> list[float]:
        """The momentum of each parameter group at the present iteration; empty where momentum is not cycled."""
        if self._momentum is None:
            return []
        low, high = self._momentum
        momentum = (high - (high - low) * self._height()) * (1 + self._decay_rates[1] * self._decay_interval())
        return [momentum] * len(self.optimizer.param_groups)

    def _apply(self) -> None:
        super()._apply()
        for group, momentum in zip(self.optimizer.param_groups, self.get_mom(), strict=False):
            if "betas" in group:
                group["betas"] = (momentum, *group["betas"][1:])
            elif "momentum" in group:
                group["momentum"] = momentum

    def _height(self) -> float:
        """Where in the cycle: 0 at its ends, 1 at the top."""
        first, second = self._sizes
        if self.iteration <= first:
            return _stairs(self.iteration / first, self._stairs[0])
        return 1 - _stairs(min(1.0, (self.iteration - first) / second), self._stairs[1])

    def _decay_interval(self) -> float:
        past = self.iteration - sum(self._sizes)
        return past / self._decay_step_size if past > 0 and self._decay_step_size > 0 else 0.0


class WarmupLR(Schedule):
    """From ``warmup_min_lr`` to ``warmup_max_lr`` in ``warmup_num_steps`` iterations, then constant.

    The way there is ``log(1 + iteration) / log(warmup_num_steps)`` ("log") or ``iteration / warmup_num_steps``
    ("linear").
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        warmup_min_lr: PerGroup = 0.0,
        warmup_max_lr: PerGroup = 0.001,
        warmup_num_steps: int = 1000,
        warmup_type: str = "log",
        last_batch_iteration: int = -1,
    ):
        self.optimizer = optimizer
        self._minimum = self._per_group("warmup_min_lr", warmup_min_lr)
        self._maximum = self._per_group("warmup_max_lr", warmup_max_lr)
        self._warmup = _Warmup(warmup_num_steps, warmup_type)
        super().__init__(optimizer, last_batch_iteration)

    def get_lr(self) -> list[float]:
        """The learning rate of each parameter group at the present iteration."""
        height = self._height()
        return [low + (high - low) * height for low, high in zip(self._minimum, self._maximum, strict=True)]

    def _height(self) -> float:
        return self._warmup(self.iteration)


class WarmupDecayLR(WarmupLR):
    """As WarmupLR, then linearly down to ``warmup_min_lr`` at iteration ``total_num_steps``."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        total_num_steps: int,
        warmup_min_lr: PerGroup = 0.0,
        warmup_max_lr: PerGroup = 0.001,
        warmup_num_steps: int = 1000,
        warmup_type: str = "log",
        last_batch_iteration: int = -1,
    ):
        self._total = total_num_steps
        super().__init__(optimizer, warmup_min_lr, warmup_max_lr, warmup_num_steps, warmup_type, last_batch_iteration)

    def _height(self) -> float:
        if self.iteration < self._warmup.steps:
            return self._warmup(self.iteration)
        return max(0.0, (self._total - self.iteration) / max(1.0, self._total - self._warmup.steps))


class WarmupCosineLR(Schedule):
    """The optimizer's own learning rates times a ratio: ``warmup_min_ratio`` to 1 in ``warmup_num_steps`` iterations,
    then a half cosine down to ``cos_min_ratio`` at iteration ``total_num_steps``."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        total_num_steps: int,
        warmup_min_ratio: float = 0.0,
        warmup_num_steps: int = 1000,
        cos_min_ratio: float = 0.0001,
        warmup_type: str = "log",
        last_batch_iteration: int = -1,
    ):
        self._total = total_num_steps
        self._ratios = warmup_min_ratio, cos_min_ratio
        self._warmup = _Warmup(warmup_num_steps, warmup_type)
        self._base = [float(group.setdefault("initial_lr", group["lr"])) for group in optimizer.param_groups]
        super().__init__(optimizer, last_batch_iteration)

    def get_lr(self) -> list[float]:
        """The learning rate of each parameter group at the present iteration."""
        ratio = self.get_lr_ratio()
        return [base * ratio for base in self._base]

    def get_lr_ratio(self) -> float:
        """The present factor of the learning rates."""
        start, end = self._ratios
        if self.iteration < self._warmup.steps:
            return start + (1 - start) * self._warmup(self.iteration)
        progress = (self.iteration - self._warmup.steps) / max(1.0, self._total - self._warmup.steps)
        return end + (1 - end) * (1 + math.cos(math.pi * min(1.0, progress))) / 2

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {**super().state_dict(), "base_lrs": list(self._base)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from what ``state_dict`` returned."""
        self._base = [float(lr) for lr in state_dict.get("base_lrs", self._base)]
        super().load_state_dict(state_dict)


class _Warmup:
    """From 0 to 1 in ``steps`` iterations."""

    def __init__(self, steps: int, kind: str):
        if kind not in (WARMUP_LOG_RATE, WARMUP_LINEAR_RATE):
            raise ValueError(f"warmup_type is '{kind}', expected '{WARMUP_LOG_RATE}' or '{WARMUP_LINEAR_RATE}'")
        # A logarithmic warm-up of one step would divide by log(1).
        self.steps = max(2, int(steps)) if kind == WARMUP_LOG_RATE else max(1, int(steps))
        self._kind = kind

    def __call__(self, iteration: int) -> float:
        if iteration >= self.steps:
            return 1.0
        if self._kind == WARMUP_LOG_RATE:
            return math.log(1 + iteration) / math.log(self.steps)
        return iteration / self.steps


def _stairs(fraction: float, count: int) -> float:
    return math.floor(fraction * count) / count if count > 0 else fraction


def _positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name} is {value}, expected a number above 0")


LR_RANGE_TEST, LR_RANGE_TEST_MIN_LR = "LRRangeTest", "lr_range_test_min_lr"
LR_RANGE_TEST_STEP_RATE, LR_RANGE_TEST_STEP_SIZE = "lr_range_test_step_rate", "lr_range_test_step_size"
LR_RANGE_TEST_STAIRCASE = "lr_range_test_staircase"
ONE_CYCLE, CYCLE_MIN_LR, CYCLE_MAX_LR = "OneCycle", "cycle_min_lr", "cycle_max_lr"
CYCLE_FIRST_STEP_SIZE, DECAY_LR_RATE, DECAY_STEP_SIZE = "cycle_first_step_size", "decay_lr_rate", "decay_step_size"
CYCLE_MIN_MOM, CYCLE_MAX_MOM, DECAY_MOM_RATE = "cycle_min_mom", "cycle_max_mom", "decay_mom_rate"
WARMUP_LR, WARMUP_DECAY_LR, WARMUP_COSINE_LR = "WarmupLR", "WarmupDecayLR", "WarmupCosineLR"
WARMUP_MIN_LR, WARMUP_MAX_LR, WARMUP_NUM_STEPS = "warmup_min_lr", "warmup_max_lr", "warmup_num_steps"
WARMUP_TYPE, WARMUP_LOG_RATE, WARMUP_LINEAR_RATE = "warmup_type", "log", "linear"
WARMUP_MIN_RATIO, COS_MIN_RATIO, TOTAL_NUM_STEPS = "warmup_min_ratio", "cos_min_ratio", "total_num_steps"

SCHEDULES: Mapping[str, type[Schedule]] = {
    LR_RANGE_TEST: LRRangeTest,
    ONE_CYCLE: OneCycle,
    WARMUP_LR: WarmupLR,
    WARMUP_DECAY_LR: WarmupDecayLR,
    WARMUP_COSINE_LR: WarmupCosineLR,
}
VALID_LR_SCHEDULES: list[str] = list(SCHEDULES)


def build_scheduler(type: str, params: Mapping[str, object], optimizer: torch.optim.Optimizer) -> Schedule:
    """The schedule that a configuration's ``scheduler`` section names, in any case, on ``optimizer``.

    Raises ValueError for an unknown type or argument, with the nearest known one.
    """
    by_name = {name.lower(): (name, schedule) for name, schedule in SCHEDULES.items()}
    if type.lower() not in by_name:
        known = closest(type, VALID_LR_SCHEDULES)
        raise ValueError(f"scheduler.type '{type}' is unknown.{known} Available: {', '.join(VALID_LR_SCHEDULES)}")
    name, schedule = by_name[type.lower()]
    return schedule(optimizer, **checked_arguments("scheduler", name, schedule, params, given=("optimizer",)))
