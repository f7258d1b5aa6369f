"""Loading a checkpoint into an engine: ``plan``, then ``install``.

The plan says where each range of the engine's own slices and tensors is stored. Making it reads and checks everything, so
that a checkpoint that is damaged, incomplete or another model's is found out on all ranks before a value changes. World
size, stage and bucket size may differ from those at saving: a slice asks for its ranges, whoever wrote them.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..checkpoint.directory import CheckpointError, find_checkpoint, on_all_ranks, read_latest
from ..checkpoint.opening import open_source
from ..checkpoint.source import WEIGHT, Part, Source
from ..memory.layout import Fragment
from ..optim.segments import FlatShard, cuts
from ..zero.gathered import GatheredParameters
from ..zero.optimizer import ShardedOptimizer
from ..zero.streaming import give_up_states
from ..zero.unfreezing import unfreeze
from .checkpointing import model_shapes, untrained_tensors
from .rank_states import Resumption, resume, resumption

if TYPE_CHECKING:
    from .information import EngineInformation

logger = logging.getLogger("DeepSpeed")


@dataclass(frozen=True)
class LoadRequest:
    """Which states to load. ``strict`` asks for the same tensors in the checkpoint and in the model. ``load_module``
    called with ``src``, the module's state dict in the checkpoint, and ``dst``, the module, loads the weights where given."""

    strict: bool = True
    optimizer_states: bool = True
    scheduler_states: bool = True
    counters: bool = True
    load_module: Callable[..., object] | None = None


@dataclass(frozen=True)
class _Fill:
    """``parts``, end to end, go to the elements of a flat tensor from ``start`` on."""

    start: int
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class _Plan:
    """What to read: for each slice of the optimizer and kind of state, for each slice that is not trained, and for each
    other tensor of the module (for all of them where the user loads these). ``numbers`` are the optimizer states that are
    numbers, by parameter."""

    slices: list[dict[str, list[_Fill]]] = field(default_factory=list)
    numbers: dict[str, dict[str, Any]] = field(default_factory=dict)
    frozen: list[list[_Fill]] = field(default_factory=list)
    tensors: dict[str, list[_Fill]] = field(default_factory=dict)

    def pieces(self) -> Iterator[str]:
        """Every stored tensor that is read, some more than once."""
        lists = [fills for kinds in self.slices for fills in kinds.values()] + self.frozen + list(self.tensors.values())
        return (part.piece for fills in lists for fill in fills for part in fill.parts)


def load_training_checkpoint(
    engine: EngineInformation, directory: Path, *, tag: str | None, request: LoadRequest
) -> tuple[str | None, dict[str, Any] | None]:
    """Load ``directory/tag``, or what ``latest`` names. Called on every rank.

    Raises CheckpointError on all ranks, with the engine as it was, where one of them cannot load.
    """
    communicator = engine.communicator
    engine.sharded_model.trained.presence.require("load_checkpoint")
    on_all_ranks(engine._saves.wait, "the save before this load", communicator)
    found = on_all_ranks(lambda: tag or read_latest(directory), f"loading {directory}", communicator)
    tags = communicator.gather_objects(found, purpose="agreement on the checkpoint to load")
    if len(set(tags)) > 1:
        raise CheckpointError(f"ranks see different checkpoints in {directory}: {tags}. All must see the same directory.")
    if found is None:
        logger.warning("no checkpoint is loaded: %s has no file 'latest', and no tag is given", directory)
        return None, None
    with ExitStack() as open_files:

        def open_reader() -> Source:
            reader = open_files.enter_context(open_source(find_checkpoint(directory, found)))
            _check_fit(engine, reader, request)
            return reader

        def prepare() -> tuple[_Plan, dict[str, Any], Resumption | None]:
            plan = _make_plan(engine, reader, request)
            reader.verify(plan.pieces())
            own = resumption(reader, communicator) if request.counters else None
            return plan, reader.client_state(), own

        reader = on_all_ranks(open_reader, f"loading {directory / found}", communicator)
        if engine.optimizer is not None and request.optimizer_states:
            _unfreeze_as_saved(engine.optimizer, reader)
        plan, client_state, own = on_all_ranks(prepare, f"loading {directory / found}", communicator)
        _install(engine, reader, plan, request)
        if own is not None:
            resume(engine, own)
    return str(directory / found), client_state


def _check_fit(engine: EngineInformation, reader: Source, request: LoadRequest) -> None:
    """Raise CheckpointError where the checkpoint is of another model or optimizer."""
    optimizer = engine.optimizer
    shapes = model_shapes(engine)
    if request.load_module is None:
        problems = _of_another_model(reader, shapes, request.strict)
        if not request.strict and engine.communicator.rank == 0:
            _log_what_differs(reader, shapes)
    else:
        # The user knows what becomes of the weights; optimizer states go by name and shape.
        stated = [name for name in shapes if request.optimizer_states and reader.kinds(name) > {WEIGHT}]
        problems = _of_another_model(reader, {name: shapes[name] for name in stated}, strict=False)
    if optimizer is not None and request.optimizer_states:
        problems += _of_another_optimizer(reader, optimizer)
    if problems:
        raise CheckpointError(f"{reader.path} does not fit: {'; '.join(problems[:8])}")


def _unfreeze_as_saved(optimizer: ShardedOptimizer, reader: Source) -> None:
    """Give parameters that are frozen here a place for the optimizer states that they have in the checkpoint: they were
    unfrozen when it was saved, and may be again."""
    names = [name for name in optimizer.frozen.waiting if reader.kinds(name) > {WEIGHT}]
    if names:
        unfreeze(optimizer, names)


def _make_plan(engine: EngineInformation, reader: Source, request: LoadRequest) -> _Plan:
    optimizer, ours = engine.optimizer, untrained_tensors(engine)
    plan = _Plan(numbers=_numbers(reader) if optimizer is not None and request.optimizer_states else {})
    for shard in optimizer.shards if optimizer is not None else ():
        kinds = {WEIGHT} if request.load_module is None else set()
        if request.optimizer_states:
            kinds = kinds.union(*(reader.kinds(f.spec.name) - {WEIGHT} for f in shard.fragments))
        plan.slices.append({kind: _fills(reader, kind, shard) for kind in sorted(kinds)})
    for shard in engine.sharded_model.frozen_shards if request.load_module is None else ():
        plan.frozen.append(_fills(reader, WEIGHT, shard))
    for name in reader.shapes.keys() & ours.keys() if request.load_module is None else reader.shapes:
        plan.tensors[name] = [_Fill(0, tuple(reader.parts(WEIGHT, name, 0, prod(reader.shapes[name]))))]
    return plan


def _fills(reader: Source, kind: str, shard: FlatShard) -> list[_Fill]:
    def stored(name: str) -> bool:
        return name in reader.shapes if kind == WEIGHT else kind in reader.kinds(name)

    fragments = [fragment for fragment in shard.fragments if stored(fragment.spec.name)]
    return [_Fill(f.slice_start, tuple(reader.parts(kind, f.spec.name, f.parameter_start, f.numel))) for f in fragments]


def _numbers(reader: Source) -> dict[str, dict[str, Any]]:
    """The states of each parameter that are numbers, by its name."""
    return {name: entry["numbers"] for entry in reader.index["optimizer"]["parameters"] for name in entry["names"]}


def _of_another_model(reader: Source, ours: dict[str, tuple[int, ...]], strict: bool) -> list[str]:
    theirs = reader.shapes
    problems = [f"{n} has shape {theirs[n]} there and {ours[n]} here" for n in ours if n in theirs and theirs[n] != ours[n]]
    if strict:
        missing, unexpected = _differing_names(reader, ours)
        problems += [f"{name} is missing there" for name in missing]
        problems += [f"{name} is not in this model" for name in unexpected]
    return problems


def _differing_names(reader: Source, ours: dict[str, tuple[int, ...]]) -> tuple[list[str], list[str]]:
    """The tensors that only this model has, but for those that were left out on purpose, and those that it has not."""
    left_out = set(reader.index["left_out"])
    missing = [name for name in ours if name not in reader.shapes and name not in left_out]
    return missing, [name for name in reader.shapes if name not in ours]


def _log_what_differs(reader: Source, ours: dict[str, tuple[int, ...]]) -> None:
    missing, unexpected = _differing_names(reader, ours)
    if missing or unexpected:
        logger.warning(
            "loading %s with load_module_strict=False: missing there and left as they are: %s; not in this model: %s",
            reader.path,
            ", ".join(missing) or "none",
            ", ".join(unexpected) or "none",
        )


def _of_another_optimizer(reader: Source, optimizer: ShardedOptimizer) -> list[str]:
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
def _install(engine: EngineInformation, reader: Source, plan: _Plan, request: LoadRequest) -> None:
    optimizer, index = engine.optimizer, reader.index
    engine.sharded_model.scopes.settle()
    if optimizer is not None:
        optimizer.zero_grad()
    if request.load_module is not None:
        _load_module(engine, reader, request.load_module)
    else:
        _install_weights(engine, reader, plan)
    if optimizer is not None and request.optimizer_states:
        for shard, kinds in zip(optimizer.shards, plan.slices, strict=True):
            with optimizer.flat.chunks[shard.bucket.index].changing():
                _install_state(optimizer, shard, kinds, plan.numbers, reader)
        _install_options(optimizer, index["optimizer"])
    if optimizer is not None:
        optimizer.flat.parameters_from_masters(optimizer.groups.shards)
    if request.counters:
        for name, value in index["counters"].items():
            setattr(engine.counters, name, value)
    if request.scheduler_states and index["scheduler"] is not None:
        _install_schedule(engine.lr_scheduler, index["scheduler"])


def _install_schedule(scheduler: Any, saved: dict[str, Any]) -> None:
    if not hasattr(scheduler, "load_state_dict"):
        return
    if saved["type"] == type(scheduler).__name__:
        scheduler.load_state_dict(saved["state"])
    else:
        logger.warning(
            "the schedule is not loaded: the checkpoint's is %s, this engine's %s", saved["type"], type(scheduler).__name__
        )


def _install_weights(engine: EngineInformation, reader: Source, plan: _Plan) -> None:
    model = engine.sharded_model
    for shard, kinds in zip(engine.optimizer.shards if engine.optimizer is not None else (), plan.slices, strict=True):
        with model.trained.chunks[shard.bucket.index].changing():
            _fill(shard.tensor, kinds[WEIGHT], reader)
    for shard, fills in zip(model.frozen_shards, plan.frozen, strict=True):
        with model.frozen.chunks[shard.bucket.index].changing():
            _fill(shard.tensor, fills, reader)
    for name, tensor in untrained_tensors(engine).items():
        if name in plan.tensors:
            whole = torch.empty(tensor.numel(), dtype=tensor.dtype)
            _fill(whole, plan.tensors[name], reader)
            tensor.copy_(whole.view(tensor.shape))


def _load_module(engine: EngineInformation, reader: Source, load: Callable[..., object]) -> None:
    """Let the user's function load the weights. The masters take over what it wrote, in fp32."""
    module, optimizer, communicator = engine.module, engine.optimizer, engine.communicator
    state = OrderedDict((name, reader.whole(name)) for name in reader.shapes)
    state.update((name, state[stored]) for name, stored in reader.names.items())
    if optimizer is None:
        on_all_ranks(lambda: load(src=state, dst=module), "custom_load_fn", communicator)
        return
    flat = optimizer.flat

    def checked() -> None:
        load(src=state, dst=module)
        now = dict(module.named_parameters())
        for name, (_, placement) in flat.layout.homes.items():
            if now.get(name) is not flat.parameters[name] or tuple(now[name].shape) != placement.spec.shape:
                raise CheckpointError(f"custom_load_fn replaced or reshaped the parameter {name}: write into it instead")

    frozen = GatheredParameters(engine.sharded_model.frozen.parameters, modifier_rank=0)
    with flat.detached(optimizer.groups.shards), frozen:
        on_all_ranks(checked, "custom_load_fn", communicator)


def _fill(target: Tensor, fills: list[_Fill], reader: Source) -> None:
    for fill in fills:
        at = fill.start
        for part in fill.parts:
            target[at : at + part.numel] = reader.read_part(part)
            at += part.numel


def _install_state(
    optimizer: ShardedOptimizer,
    shard: FlatShard,
    kinds: dict[str, list[_Fill]],
    numbers: dict[str, dict[str, Any]],
    reader: Source,
) -> None:
    """Give a slice its states, cut where parameters had different ones."""
    flats = {kind: torch.zeros_like(shard.tensor) for kind in kinds if kind != WEIGHT}
    for kind, flat in flats.items():
        _fill(flat, kinds[kind], reader)

    def states(fragment: Fragment) -> tuple[dict[str, Any], list[str]]:
        name = fragment.spec.name
        return numbers.get(name, {}), [kind for kind in flats if kind in reader.kinds(name)]

    give_up_states(optimizer, shard)
    for segment in optimizer.segments.recut(shard, cuts(shard.fragments, states)):
        own, elementwise = states(segment.fragments[0]) if segment.fragments else ({}, [])
        state = {key: _number(value) for key, value in own.items()} | {k: flats[k][segment.where] for k in elementwise}
        if state:
            optimizer.state[segment.tensor] = state


def _number(value: Any) -> Any:
    return torch.tensor(value["tensor"], dtype=getattr(torch, value["dtype"])) if isinstance(value, dict) else value


def _install_options(optimizer: ShardedOptimizer, saved: dict[str, Any]) -> None:
    for group, options in zip(optimizer.param_groups, saved["groups"], strict=True):
        group.update({k: tuple(v) if isinstance(group.get(k), tuple) else v for k, v in options.items()})
    if saved["scaler"]["type"] == type(optimizer.scaler).__name__:
        optimizer.scaler.load_state_dict(saved["scaler"]["state"])
