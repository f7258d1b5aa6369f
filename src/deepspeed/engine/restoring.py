"""Loading a checkpoint into an engine: ``plan``, then ``install``.

The plan says where each range of the engine's own slices and tensors is stored. Making it reads and checks everything, so
that a checkpoint that is damaged, incomplete or another model's is found out on all ranks before a value changes. World
size, stage and bucket size may differ from those at saving: a slice asks for its ranges, whoever wrote them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..checkpoint.directory import CheckpointError, find_checkpoint, on_all_ranks, read_latest
from ..checkpoint.reader import WEIGHT, CheckpointReader, Part
from ..checkpoint.values import decode
from ..optim.sharding import FlatShard
from ..zero.optimizer import ShardedOptimizer
from .checkpointing import client_name, untrained_tensors

if TYPE_CHECKING:
    from .engine import DeepSpeedEngine

logger = logging.getLogger("DeepSpeed")


@dataclass(frozen=True)
class LoadRequest:
    """Which states to load. ``strict`` asks for the same tensors in the checkpoint and in the model."""

    strict: bool = True
    optimizer_states: bool = True
    scheduler_states: bool = True
    counters: bool = True


@dataclass(frozen=True)
class _Fill:
    """``parts``, end to end, go to the elements of a flat tensor from ``start`` on."""

    start: int
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class _Plan:
    """What to read: for each slice of the optimizer and kind of state, and for each other tensor of the module."""

    slices: list[dict[str, list[_Fill]]] = field(default_factory=list)
    tensors: dict[str, list[_Fill]] = field(default_factory=dict)

    def pieces(self) -> Iterator[str]:
        """Every stored tensor that is read, some more than once."""
        lists = [fills for kinds in self.slices for fills in kinds.values()] + list(self.tensors.values())
        return (part.piece for fills in lists for fill in fills for part in fill.parts)


def load_training_checkpoint(
    engine: DeepSpeedEngine, directory: Path, *, tag: str | None, request: LoadRequest
) -> tuple[str | None, dict[str, Any] | None]:
    """Load ``directory/tag``, or what ``latest`` names. Called on every rank.

    Raises CheckpointError on all ranks, with the engine as it was, where one of them cannot load.
    """
    communicator = engine.communicator
    found = on_all_ranks(lambda: tag or read_latest(directory), f"loading {directory}", communicator)
    tags = communicator.gather_objects(found)
    if len(set(tags)) > 1:
        raise CheckpointError(f"ranks see different checkpoints in {directory}: {tags}. All must see the same directory.")
    if found is None:
        logger.warning("no checkpoint is loaded: %s has no file 'latest', and no tag is given", directory)
        return None, None
    with ExitStack() as open_files:

        def prepare() -> tuple[CheckpointReader, _Plan, dict[str, Any]]:
            reader = open_files.enter_context(CheckpointReader(find_checkpoint(directory, found)))
            plan = _make_plan(engine, reader, request)
            reader.verify(plan.pieces())
            return reader, plan, decode(reader.index["client_state"], lambda name: reader.verified(client_name(name)))

        reader, plan, client_state = on_all_ranks(prepare, f"loading {directory / found}", communicator)
        _install(engine, reader, plan, request)
    return str(directory / found), client_state


def _make_plan(engine: DeepSpeedEngine, reader: CheckpointReader, request: LoadRequest) -> _Plan:
    optimizer = engine.optimizer
    ours = untrained_tensors(engine)
    shapes = {name: tuple(value.shape) for name, value in ours.items()}
    if optimizer is not None:
        shapes |= {name: tuple(p.shape) for name, p in optimizer.flat.parameters.items()}
    problems = _of_another_model(reader, shapes, request.strict)
    if optimizer is not None and request.optimizer_states:
        problems += _of_another_optimizer(reader, optimizer)
    if problems:
        raise CheckpointError(f"{reader.path} does not fit: {'; '.join(problems[:8])}")
    plan = _Plan()
    for shard in optimizer.shards if optimizer is not None else ():
        # Of the whole bucket: a slice that is padding alone steps too, and has states.
        names = {placement.spec.name for placement in shard.bucket.placements}
        kinds = reader.kinds(names) if request.optimizer_states else {WEIGHT}
        plan.slices.append({kind: _fills(reader, kind, shard) for kind in sorted(kinds)})
    for name in ours.keys() & reader.shapes.keys():
        plan.tensors[name] = [_Fill(0, tuple(reader.parts(WEIGHT, name, 0, ours[name].numel())))]
    return plan


def _fills(reader: CheckpointReader, kind: str, shard: FlatShard) -> list[_Fill]:
    fragments = [f for f in shard.fragments if f.spec.name in reader.shapes and kind in reader.kinds([f.spec.name])]
    return [_Fill(f.slice_start, tuple(reader.parts(kind, f.spec.name, f.parameter_start, f.numel))) for f in fragments]


def _of_another_model(reader: CheckpointReader, ours: dict[str, tuple[int, ...]], strict: bool) -> list[str]:
    theirs = reader.shapes
    problems = [f"{n} has shape {theirs[n]} there and {ours[n]} here" for n in ours if n in theirs and theirs[n] != ours[n]]
    if strict:
        left_out = set(reader.index["left_out"])
        problems += [f"{name} is missing there" for name in ours if name not in theirs and name not in left_out]
        problems += [f"{name} is not in this model" for name in theirs if name not in ours]
    return problems


def _of_another_optimizer(reader: CheckpointReader, optimizer: ShardedOptimizer) -> list[str]:
    saved = reader.index["optimizer"]
    remedy = "pass load_optimizer_states=False to load the weights alone"
    if saved is None:
        return [f"it has no optimizer states; {remedy}"]
    kind = type(optimizer.optimizer).__name__
    if saved["type"] != kind and {saved["type"], kind} != {"Adam", "AdamW"}:
        return [f"its optimizer is {saved['type']} and this engine's {kind}; {remedy}"]
    if len(saved["groups"]) != len(optimizer.param_groups):
        return [f"it has {len(saved['groups'])} parameter groups and this engine {len(optimizer.param_groups)}; {remedy}"]
    return []


@torch.no_grad()
def _install(engine: DeepSpeedEngine, reader: CheckpointReader, plan: _Plan, request: LoadRequest) -> None:
    optimizer, index = engine.optimizer, reader.index
    if optimizer is not None:
        optimizer.zero_grad()
        for shard, kinds in zip(optimizer.shards, plan.slices, strict=True):
            _fill(shard.tensor, kinds.pop(WEIGHT, []), reader)
            if request.optimizer_states:
                _install_state(optimizer, shard, kinds, reader)
        if request.optimizer_states:
            _install_options(optimizer, index["optimizer"])
        optimizer.flat.parameters_from_masters(optimizer.communicator)
    for name, tensor in untrained_tensors(engine).items():
        if name in plan.tensors:
            whole = torch.empty(tensor.numel(), dtype=tensor.dtype)
            _fill(whole, plan.tensors[name], reader)
            tensor.copy_(whole.view(tensor.shape))
    if request.counters:
        for name, value in index["counters"].items():
            setattr(engine.counters, name, value)
    scheduler = engine.lr_scheduler
    if request.scheduler_states and hasattr(scheduler, "load_state_dict") and index["scheduler"] is not None:
        if index["scheduler"]["type"] == type(scheduler).__name__:
            scheduler.load_state_dict(index["scheduler"]["state"])
        else:
            logger.warning(
                "the schedule is not loaded: the checkpoint's is %s, this engine's %s",
                index["scheduler"]["type"],
                type(scheduler).__name__,
            )


def _fill(target: Tensor, fills: list[_Fill], reader: CheckpointReader) -> None:
    for fill in fills:
        at = fill.start
        for part in fill.parts:
            target[at : at + part.numel] = reader.read_part(part)
            at += part.numel


def _install_state(
    optimizer: ShardedOptimizer, shard: FlatShard, kinds: dict[str, list[_Fill]], reader: CheckpointReader
) -> None:
    numbers = reader.index["optimizer"]["numbers"][shard.bucket.group]
    state: dict[str, Any] = {
        key: torch.tensor(value["tensor"], dtype=getattr(torch, value["dtype"])) if isinstance(value, dict) else value
        for key, value in numbers.items()
    }
    optimizer.state.pop(shard.tensor, None)
    for kind, fills in kinds.items():
        state[kind] = torch.zeros_like(shard.tensor)
        _fill(state[kind], fills, reader)
    if state:
        optimizer.state[shard.tensor] = state


def _install_options(optimizer: ShardedOptimizer, saved: dict[str, Any]) -> None:
    for group, options in zip(optimizer.param_groups, saved["groups"], strict=True):
        group.update({k: tuple(v) if isinstance(group.get(k), tuple) else v for k, v in options.items()})
    if saved["scaler"]["type"] == type(optimizer.scaler).__name__:
        optimizer.scaler.load_state_dict(saved["scaler"]["state"])
