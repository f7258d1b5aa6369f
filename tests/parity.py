"""One training written once: run by plain PyTorch in one process, and by the engine on each rank of a group.

A training's ``micro_step(model, index, backward)`` computes the loss of micro-batch ``index`` and calls
``backward(loss)``, as often as it likes. Of ``n`` ranks with accumulation ``a``, rank r's micro-batch m of step s has
the index ``(s * a + m) * n + r``; plain PyTorch runs all of them and divides their losses by ``n * a``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deepspeed

TOLERANCE = 1e-6
"""Relative difference, by the 2-norm of a parameter, that reordered fp32 sums may cause."""

LR, MOMENTUM, DECAY = 0.1, 0.9, 0.01

Run = Callable[..., list[Any]]


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=LR, momentum=MOMENTUM, weight_decay=DECAY)


def default_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return sgd([p for p in model.parameters() if p.requires_grad])


def no_scheduler(optimizer: torch.optim.Optimizer) -> None:
    return None


def no_arguments(model: nn.Module) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Training:
    """``config`` and ``arguments(model)``, more keywords of ``initialize``, are for the engine, whose optimizer is SGD
    where neither says otherwise; ``optimizer(model)`` and ``scheduler(optimizer)`` are for plain PyTorch."""

    make_model: Callable[[], nn.Module]
    micro_step: Callable[[nn.Module, int, Callable[..., object]], None]
    steps: int = 3
    accumulation: int = 1
    config: Mapping[str, object] = field(default_factory=dict)
    arguments: Callable[[nn.Module], dict[str, Any]] = no_arguments
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] = default_optimizer
    scheduler: Callable[[torch.optim.Optimizer], Any] = no_scheduler


@dataclass(frozen=True)
class Result:
    """The state dict and the gradient norm of each step, before clipping."""

    weights: dict[str, Tensor]
    norms: list[float]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    with deepspeed.zero.GatheredParameters(model):
        return {name: value.detach().clone() for name, value in model.state_dict().items()}


def seeded_model(training: Training) -> nn.Module:
    torch.manual_seed(3)
    return training.make_model()


def train_plain(training: Training, ranks: int) -> Result:
    model = seeded_model(training)
    optimizer = training.optimizer(model)
    scheduler = training.scheduler(optimizer)
    micros = ranks * training.accumulation
    norms = []

    def backward(loss: Tensor, **kwargs: Any) -> None:
        (loss / micros).backward(**kwargs)

    for step in range(training.steps):
        for micro in range(micros):
            training.micro_step(model, step * micros + micro, backward)
        clip = float(str(training.config.get("gradient_clipping", 0))) or float("inf")
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        gradients = [p.grad.double().norm() for p in trained if p.grad is not None]
        norms.append(float(torch.stack(gradients).norm()))
        if norms[-1] > clip:
            torch.nn.utils.clip_grad_norm_(trained, clip)
        optimizer.step()
        optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()
    return Result(state_of(model), norms)


def make_engine(training: Training, stage: int) -> deepspeed.DeepSpeedEngine:
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": training.accumulation,
        "optimizer": {"type": "SGD", "params": {"lr": LR, "momentum": MOMENTUM, "weight_decay": DECAY}},
        **training.config,
    }
    zero = {
        "stage": stage,
        "reduce_bucket_size": 200,
        **({"stage3_param_persistence_threshold": 10} if stage == 3 else {}),
        **config.get("zero_optimization", {}),  # type: ignore[dict-item]
    }
    model = seeded_model(training)
    arguments = training.arguments(model)
    return deepspeed.initialize(model=model, config={**config, "zero_optimization": zero}, **arguments)[0]


def train_engine(training: Training, stage: int) -> Result:
    engine = make_engine(training, stage)
    rank, size = engine.communicator.rank, engine.communicator.size
    norms = []
    for step in range(training.steps):
        for micro in range(training.accumulation):
            training.micro_step(engine, (step * training.accumulation + micro) * size + rank, engine.backward)
            engine.step()
        norms.append(engine.get_global_grad_norm())
    result = Result(state_of(engine.module), norms)
    engine.destroy()
    return result


def train_engine_at_stages(training: Training, stages: tuple[int, ...]) -> list[Result]:
    return [train_engine(training, stage) for stage in stages]


def assert_close(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float = TOLERANCE) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype, f"{name} is {actual[name].dtype}"
        difference, norm = (actual[name].double() - value.double()).norm(), value.double().norm()
        assert difference <= tolerance * norm, f"{name} differs by {difference / norm:.2e} of its norm"


def assert_equal(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), f"{name} differs"


def assert_parity(
    ranks: Run,
    training: Training,
    size: int = 2,
    *,
    plain: Training | None = None,
    tolerance: float = TOLERANCE,
    stages: tuple[int, ...] = (0, 1, 2, 3),
    same_bits: tuple[int, ...] = (1, 2, 3),
) -> None:
    """Each of ``stages`` on ``size`` ranks trains to the numbers of plain PyTorch (of the training ``plain``, where another
    says the same); without accumulation, the stages ``same_bits`` to the same bits. With it they add up in another order: over
    micro-batches first, or over ranks first."""
    expected = train_plain(plain or training, size)
    for results in ranks(size, train_engine_at_stages, training, stages):
        for result in results:
            assert_close(result.weights, expected.weights, tolerance)
            assert result.norms == pytest.approx(expected.norms, rel=10 * tolerance)
        alike = [result for stage, result in zip(stages, results, strict=True) if stage in same_bits]
        for result in alike[1:] if training.accumulation == 1 else []:
            assert_equal(result.weights, alike[0].weights)
            assert result.norms == alike[0].norms
