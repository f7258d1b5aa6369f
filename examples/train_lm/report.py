"""What a run leaves to look at: its losses, and what the model states take under each ZeRO stage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from rich.table import Table
from torch import nn

import deepspeed
from deepspeed.memory.estimate import ModelStateBytes, model_state_bytes

STAGES = (0, 1, 2)
KINDS = ("parameters", "gradients", "master", "optimizer")
STATES_PER_PARAMETER = {"adam": 2, "adamw": 2, "lamb": 2, "lion": 1, "adagrad": 1}
"""fp32 values that an optimizer keeps for each parameter."""


@dataclass
class History:
    """Pairs of step and loss, since the first step of the first run."""

    training: list[tuple[int, float]] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)


@dataclass(frozen=True)
class StageStates:
    """Bytes of model states on one rank under a stage: counted from live storages, and by the formula (None where the
    optimizer has no known one)."""

    stage: int
    measured: ModelStateBytes
    computed: ModelStateBytes | None


def measure_stages(
    make_model: Callable[[], nn.Module], batch: tuple[torch.Tensor, ...], config: dict[str, Any]
) -> list[StageStates]:
    """Train a new model for one step under each stage in turn, otherwise as ``config`` says, and count its states."""
    kept = {key: config[key] for key in ("optimizer", "bf16", "torch_autocast") if key in config}
    if config.get("fp16", {}).get("enabled"):
        kept["fp16"] = {"enabled": True, "loss_scale": 1}  # a dynamic scale would skip the first steps
    measured = []
    for stage in STAGES:
        settings = {"train_micro_batch_size_per_gpu": len(batch[0]), "zero_optimization": {"stage": stage}, **kept}
        settings["log_level"] = "warning"
        engine, *_ = deepspeed.initialize(model=make_model(), config=settings)
        engine.backward(engine(*(tensor.to(engine.device) for tensor in batch)))
        engine.step()
        measured.append(StageStates(stage, engine.model_state_bytes(), _computed(engine)))
        engine.destroy()
    return measured


def _computed(engine: deepspeed.DeepSpeedEngine) -> ModelStateBytes | None:
    states = STATES_PER_PARAMETER.get(engine.config["optimizer"]["type"].lower())
    if states is None:
        return None
    parameters = list(engine.parameters())
    return model_state_bytes(
        sum(parameter.numel() for parameter in parameters),
        stage=engine.zero_optimization_stage(),
        world_size=dist.get_world_size(),
        dtype_bytes=parameters[0].element_size(),
        optimizer_states=states,
    )


def stage_table(stages: list[StageStates]) -> Table:
    """The bytes of each stage as a table for the terminal."""
    table = Table("ZeRO stage", "measured", "computed", "of stage 0", title="model states per rank", title_justify="left")
    for states in stages:
        computed = "" if states.computed is None else f"{states.computed.total / 1e6:.1f} MB"
        share = states.measured.total / stages[0].measured.total
        table.add_row(str(states.stage), f"{states.measured.total / 1e6:.1f} MB", computed, f"{share:.0%}")
    return table


def draw_report(history: History, stages: list[StageStates], path: Path) -> None:
    """Draw the losses over steps beside the bytes of each stage, measured beside computed, into a PNG file."""
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    losses, states = figure.subplots(1, 2)
    losses.plot(*zip(*history.training, strict=True), label="training", linewidth=1)
    losses.plot(*zip(*history.validation, strict=True), label="validation", marker="o")
    losses.set(xlabel="step", ylabel="loss (nats per token)", title="Loss")
    losses.legend()
    for shift, name, alpha in ((-0.2, "measured", 1.0), (0.2, "computed", 0.45)):
        bottom = [0.0] * len(stages)
        for index, kind in enumerate(KINDS):
            heights = [_megabytes(getattr(stage, name), kind) for stage in stages]
            places = [stage.stage + shift for stage in stages]
            if any(heights):  # fp32 training has no separate masters
                states.bar(places, heights, 0.36, bottom, color=f"C{index}", alpha=alpha, label=f"{kind}, {name}")
            bottom = [below + height for below, height in zip(bottom, heights, strict=True)]
        for place, height in zip(places, bottom, strict=True):
            states.annotate(f"{height:.3g}", (place, height), ha="center", va="bottom")
    states.set(xlabel="ZeRO stage", ylabel="MB per rank", title=f"Model states on each of {dist.get_world_size()} ranks")
    states.set_xticks([stage.stage for stage in stages])
    states.set_ylim(top=1.35 * states.get_ylim()[1])
    states.legend(fontsize="small", ncols=2, loc="upper right")
    figure.savefig(path, dpi=120)


def _megabytes(states: ModelStateBytes | None, kind: str) -> float:
    return 0.0 if states is None else asdict(states)[kind] / 1e6
