"""The training states as fragments, and back: what a checkpoint of an engine holds.

Each rank writes the fragments of its own slices, named ``<kind>/<parameter>@<start>``: ``master`` (fp32 parameters)
and one kind per optimizer state. Rank 0 adds the module's tensors that no optimizer trains, as ``module/<name>``. A load
collects the fragments of a kind into whole parameters, one at a time, and copies out the ranges of its own slices: world
size, stage and bucket size may differ.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..checkpoint.directory import CheckpointError, CheckpointReader, read_latest, write_checkpoint, write_latest
from ..comm.communicator import Communicator
from ..memory.layout import Fragment
from ..optim.sharding import FlatShard
from ..zero.optimizer import ShardedOptimizer
from .weights import frozen_parameters

if TYPE_CHECKING:
    from .engine import DeepSpeedEngine

MASTER = "master"
logger = logging.getLogger("DeepSpeed")


def save_training_checkpoint(
    engine: DeepSpeedEngine,
    directory: Path,
    *,
    tag: str,
    client_state: dict[str, Any],
    save_latest: bool,
    exclude_frozen_parameters: bool,
) -> None:
    """Write the engine's states under ``directory/tag``. Called on every rank."""
    tag = _agreed_tag(tag, engine.communicator, engine.settings.checkpoint.tag_validation)
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, dict[str, float]] = {}
    optimizer = engine.optimizer
    if optimizer is not None and (optimizer.policy.shard_optimizer or engine.communicator.rank == 0):
        for shard in optimizer.shards:
            for kind, flat in _elementwise(optimizer, shard).items():
                for fragment in shard.fragments:
                    tensors[f"{kind}/{_label(fragment)}"] = flat[fragment.slice_range]
    if optimizer is not None:
        scalars = {str(group): _scalars(optimizer, group) for group in range(len(optimizer.param_groups))}
    if engine.communicator.rank == 0:
        trained = set(optimizer.flat.parameters) if optimizer is not None else set()
        state = {name: value for name, value in engine.module.state_dict().items() if isinstance(value, Tensor)}
        left_out = trained | (_aliases(engine) if optimizer is not None else set())
        if exclude_frozen_parameters:
            left_out |= frozen_parameters(engine.module)
        tensors |= {f"module/{n}": v.detach().clone() for n, v in state.items() if n not in left_out}
    counters = vars(engine.counters)
    scheduler = engine.lr_scheduler.state_dict() if hasattr(engine.lr_scheduler, "state_dict") else None
    index = {
        "counters": counters,
        "client_state": client_state,
        "scheduler": _plain(scheduler),
        "scaler": optimizer.scaler.state_dict() if optimizer is not None else None,
        "optimizer_scalars": scalars,
        "groups": [_plain({k: v for k, v in g.items() if k != "params"}) for g in optimizer.param_groups]
        if optimizer is not None
        else [],
        "parameters": {n: list(p.shape) for n, p in optimizer.flat.parameters.items()} if optimizer is not None else {},
    }
    write_checkpoint(directory, tag, tensors, index, engine.communicator)
    if save_latest:
        write_latest(directory, tag, engine.communicator)


def load_training_checkpoint(
    engine: DeepSpeedEngine,
    directory: Path,
    *,
    tag: str | None,
    strict: bool,
    optimizer_states: bool,
    scheduler_states: bool,
    counters: bool,
) -> tuple[str | None, dict[str, Any] | None]:
    """Load ``directory/tag``. Everything is read and checked before the first value of the engine changes."""
    tag = tag or read_latest(directory)
    if tag is None:
        return None, None
    path = directory / tag
    reader = CheckpointReader(path)
    optimizer = engine.optimizer
    if optimizer is not None:
        _check_parameters(reader, optimizer, path, strict)
        kinds = _fragments_by_kind(reader)
        staged = [(shard, _staged(shard, kinds, reader, optimizer_states)) for shard in optimizer.shards]
        _install(optimizer, staged, reader.index if optimizer_states else None)
    rest = {name.removeprefix("module/"): reader.read(name) for name in reader.names() if name.startswith("module/")}
    engine.module.load_state_dict(rest, strict=False)
    if counters:
        for name, value in reader.index["counters"].items():
            setattr(engine.counters, name, value)
    if scheduler_states and engine.lr_scheduler is not None and reader.index["scheduler"] is not None:
        engine.lr_scheduler.load_state_dict(reader.index["scheduler"])
    return str(path), reader.index["client_state"]


def _agreed_tag(tag: str, communicator: Communicator, validation: str) -> str:
    """Rank 0's tag, under which all ranks save. Where the tags differ, ``validation`` warn says so and fail raises
    ValueError on every rank."""
    tags = communicator.gather_objects(tag)
    if validation != "ignore" and len(set(tags)) > 1:
        found = ", ".join(f"'{one}' on rank {rank}" for rank, one in enumerate(tags))
        if validation == "fail":
            raise ValueError(f"save_checkpoint was given different tags: {found}. Give the same one on every rank.")
        logger.warning("save_checkpoint was given different tags: %s. Saving under '%s'.", found, tags[0])
    return str(tags[0])


def _label(fragment: Fragment) -> str:
    return f"{fragment.spec.name}@{fragment.parameter_start}"


def _elementwise(optimizer: ShardedOptimizer, shard: FlatShard) -> dict[str, Tensor]:
    state = optimizer.state.get(shard.tensor, {})
    found = {k: v for k, v in state.items() if isinstance(v, Tensor) and v.shape == shard.tensor.shape}
    return {MASTER: shard.tensor, **found}


def _scalars(optimizer: ShardedOptimizer, group: int) -> dict[str, float]:
    """The states of a group's slices that are numbers, such as Adam's step: equal on all slices."""
    for shard in optimizer.shards:
        if shard.bucket.group == group:
            state = optimizer.state.get(shard.tensor, {})
            return {k: float(v) for k, v in state.items() if isinstance(v, (int, float)) or _is_scalar(v)}
    return {}


def _is_scalar(value: object) -> bool:
    return isinstance(value, Tensor) and value.dim() == 0


def _aliases(engine: DeepSpeedEngine) -> set[str]:
    """Names of tied parameters that the optimizer knows by another name."""
    assert engine.optimizer is not None, "only asked for with an optimizer"
    trained = {id(p) for p in engine.optimizer.flat.parameters.values()}
    return {n for n, p in engine.module.named_parameters(remove_duplicate=False) if id(p) in trained}


def _plain(value: Any) -> Any:
    """JSON values from scheduler and group settings; what has no JSON form is left out."""
    if isinstance(value, dict):
        items = {str(key): _plain(item) for key, item in value.items()}
        return {key: item for key, item in items.items() if item is not NotImplemented}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.item()
    return value if value is None or isinstance(value, (bool, int, float, str)) else NotImplemented


def _check_parameters(reader: CheckpointReader, optimizer: ShardedOptimizer, path: Path, strict: bool) -> None:
    theirs = {name: tuple(shape) for name, shape in reader.index["parameters"].items()}
    ours = {name: tuple(p.shape) for name, p in optimizer.flat.parameters.items()}
    problems = [f"{n} has shape {theirs[n]} there and {ours[n]} here" for n in ours if n in theirs and theirs[n] != ours[n]]
    if strict:
        problems += [f"{name} is missing there" for name in ours if name not in theirs]
        problems += [f"{name} is not in this model" for name in theirs if name not in ours]
    if problems:
        raise CheckpointError(f"{path} is of another model: {'; '.join(problems[:8])}")


def _fragments_by_kind(reader: CheckpointReader) -> dict[tuple[str, str], list[tuple[int, str]]]:
    """For each kind of state and parameter, the starts and tensor names of its fragments."""
    found: dict[tuple[str, str], list[tuple[int, str]]] = defaultdict(list)
    for name in reader.names():
        kind, _, label = name.partition("/")
        if kind != "module":
            parameter, _, start = label.rpartition("@")
            found[kind, parameter].append((int(start), name))
    return found


def _staged(
    shard: FlatShard, kinds: dict[tuple[str, str], list[tuple[int, str]]], reader: CheckpointReader, states: bool
) -> dict[str, Tensor]:
    """New values for one slice: its master and, with ``states``, each optimizer state that the checkpoint has."""
    names = {kind for kind, _ in kinds} if states else {MASTER}
    staged = {kind: torch.zeros_like(shard.tensor) for kind in names}
    staged[MASTER] = shard.tensor.clone()
    for kind, target in staged.items():
        for fragment in shard.fragments:
            for piece_start, values in _overlapping(kinds[kind, fragment.spec.name], fragment, reader):
                first = max(piece_start, fragment.parameter_start)
                last = min(piece_start + values.numel(), fragment.parameter_start + fragment.numel)
                at = fragment.slice_start + first - fragment.parameter_start
                target[at : at + last - first] = values[first - piece_start : last - piece_start]
    return staged


def _overlapping(pieces: list[tuple[int, str]], fragment: Fragment, reader: CheckpointReader) -> Iterator[tuple[int, Tensor]]:
    for start, name in sorted(pieces):
        if start < fragment.parameter_start + fragment.numel:
            values = reader.read(name)
            if start + values.numel() > fragment.parameter_start:
                yield start, values


@torch.no_grad()
def _install(
    optimizer: ShardedOptimizer, staged: list[tuple[FlatShard, dict[str, Tensor]]], index: dict[str, Any] | None
) -> None:
    optimizer.zero_grad()
    for shard, values in staged:
        shard.tensor.copy_(values.pop(MASTER))
        if index is not None and values:
            scalars = index["optimizer_scalars"].get(str(shard.bucket.group), {})
            state = {name: torch.tensor(float(number)) for name, number in scalars.items()}
            optimizer.state[shard.tensor] = {**state, **values}
    if index is not None:
        for group, saved in zip(optimizer.param_groups, index["groups"], strict=True):
            group.update({k: tuple(v) if isinstance(group.get(k), tuple) else v for k, v in saved.items()})
        optimizer.scaler.load_state_dict(index["scaler"])
    optimizer.flat.parameters_from_masters(optimizer.communicator, sharded=optimizer.policy.shard_optimizer)
