"""What a checkpoint of an engine holds.

Each rank writes its own slices, cut at parameters: the weights (in fp32) and each optimizer state; and its random states.
Rank 0 adds the module's tensors that no optimizer trains, and in the index all that is small: counters, schedule, loss scaler,
options of the parameter groups, the step number of each parameter, the place in the data, ``client_state``. Gradients are not
saved: a checkpoint is the state after the last optimizer step.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..checkpoint.background import save_in_background
from ..checkpoint.directory import Attempt, CheckpointError, on_all_ranks, write_checkpoint
from ..checkpoint.handing_over import write_in_original_layout
from ..checkpoint.reader import WEIGHT, client_name, piece_name, rank_name
from ..checkpoint.script import write_script
from ..checkpoint.values import encode
from ..checkpoint.writer import Piece, Pieces
from ..comm.communicator import Communicator
from ..comm.groups import group_timeout
from ..memory.tiers import Chunk
from ..optim.segments import FlatShard, Segment, is_elementwise
from ..zero.optimizer import ShardedOptimizer
from .rank_states import rank_states
from .weights import frozen_parameters

if TYPE_CHECKING:
    from .information import EngineInformation

logger = logging.getLogger("DeepSpeed")


def save_training_checkpoint(
    engine: EngineInformation,
    directory: Path,
    *,
    tag: str,
    client_state: dict[str, Any],
    save_latest: bool,
    exclude_frozen_parameters: bool,
) -> None:
    """Write the engine's states under ``directory/tag``. Called on every rank."""
    communicator, settings = engine.communicator, engine.settings.checkpoint
    engine.sharded_model.trained.presence.require("save_checkpoint")
    on_all_ranks(engine._saves.wait, "the save before this one", communicator)
    tag = _agreed_tag(tag, communicator, settings.tag_validation)
    left_out = frozen_parameters(engine.module) if exclude_frozen_parameters else set()

    def compose() -> tuple[list[Pieces], dict[str, Any], dict[str, Any]]:
        client_tensors: dict[str, Tensor] = {}
        own_tensors: dict[str, Tensor] = {}
        own = encode(rank_states(engine), str(communicator.rank), own_tensors)
        encoded = encode(client_state, "client_state", client_tensors)
        others = {name: value for name, value in untrained_tensors(engine).items() if name not in left_out}
        groups = trained_pieces(engine.optimizer) + frozen_pieces(engine, left_out)
        groups.append(Pieces({rank_name(name): Piece(value) for name, value in own_tensors.items()}))
        if communicator.rank == 0:
            groups.append(Pieces({piece_name(WEIGHT, name, 0): Piece(value) for name, value in others.items()}))
            groups.append(Pieces({client_name(name): Piece(value) for name, value in client_tensors.items()}))
        shapes = {name: list(shape) for name, shape in model_shapes(engine).items() if name not in left_out}
        tied = _tied_names(engine)
        frozen = {tied.get(name, name) for name in frozen_parameters(engine.module)}
        names = {"shapes": shapes, "tied": tied, "frozen": sorted(frozen), "left_out": sorted(left_out)}
        return groups, {**_small_states(engine), "client_state": encoded, **names}, own

    def add_script() -> None:
        if communicator.rank == 0:
            directory.mkdir(parents=True, exist_ok=True)
            write_script(directory)

    groups, index, own = on_all_ranks(compose, f"saving {directory / tag}", communicator)
    numbers = _numbers(engine.optimizer) if engine.optimizer is not None else []
    in_memory = all(group.resident for group in groups)
    everyones = communicator.gather_objects((own, numbers, in_memory), purpose="save of a checkpoint")
    index["rank_states"] = [own for own, _, _ in everyones]
    if engine.optimizer is not None:
        index["optimizer"]["parameters"] = _joined([numbers for _, numbers, _ in everyones])
    attempt = Attempt(directory, tag, communicator.size, keep=settings.keep_last, latest=save_latest)
    on_all_ranks(add_script, f"saving {directory / tag}", communicator)
    if settings.format == "deepspeed":
        write_in_original_layout(attempt, groups, index, communicator)
    elif settings.async_save and all(in_memory for _, _, in_memory in everyones):
        patience = group_timeout(communicator.group).total_seconds()
        save_in_background(engine._saves, attempt, groups, index, communicator, patience)
    else:
        write_checkpoint(attempt, groups, index, communicator)


def trained_pieces(optimizer: ShardedOptimizer | None) -> list[Pieces]:
    """This rank's part of the trained parameters and their optimizer states, bucket by bucket; rank 0's is all where they
    are whole, and the first copy's where there are several.

    Raises CheckpointError for a state that is neither of its parameter's size nor a number: no other rank count could
    load it.
    """
    if optimizer is None:
        return []
    if not (optimizer.groups.is_first_copy if optimizer.policy.shard_optimizer else optimizer.communicator.rank == 0):
        return []
    return [
        Pieces(_pieces_of(optimizer, shard), _present(optimizer.flat.chunks[shard.bucket.index])) for shard in optimizer.shards
    ]


def _present(chunk: Chunk) -> Callable[[], AbstractContextManager[object]]:
    """What has a chunk in memory; nothing is needed where it always is."""
    return chunk.reading if chunk.evictables() else nullcontext


def _pieces_of(optimizer: ShardedOptimizer, shard: FlatShard) -> dict[str, Piece]:
    return {
        piece_name(kind, fragment.spec.name, fragment.parameter_start): Piece(flat, segment.part(fragment))
        for segment in optimizer.segments.of(shard)
        for kind, flat in {WEIGHT: segment.tensor, **_elementwise(optimizer, segment)}.items()
        for fragment in segment.fragments
    }


def frozen_pieces(engine: EngineInformation, left_out: Collection[str]) -> list[Pieces]:
    """This rank's part of the parameters that are sharded and not trained, but for those ``left_out``."""
    model = engine.sharded_model
    if not model.groups.is_first_copy:
        return []
    return [
        Pieces(
            {
                piece_name(WEIGHT, fragment.spec.name, fragment.parameter_start): Piece(shard.tensor, fragment.slice_range)
                for fragment in shard.fragments
                if fragment.spec.name not in left_out
            },
            _present(model.frozen.chunks[shard.bucket.index]),
        )
        for shard in model.frozen_shards
    ]


def model_shapes(engine: EngineInformation) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of the module, by the name under which it is stored, in the module's order."""
    shapes = {name: tuple(value.shape) for name, value in untrained_tensors(engine).items()}
    for flat in (engine.sharded_model.trained, engine.sharded_model.frozen):
        shapes |= {name: placement.spec.shape for name, (_, placement) in flat.layout.homes.items()}
    return {name: shapes[name] for name in engine.module.state_dict(keep_vars=True) if name in shapes}


def untrained_tensors(engine: EngineInformation) -> dict[str, Tensor]:
    """The module's tensors that are whole on every rank and not trained, by their first names in its state dict."""
    model = engine.sharded_model
    seen = {id(p) for flat in (model.trained, model.frozen) for p in flat.parameters.values()}
    found = {}
    for name, value in engine.module.state_dict(keep_vars=True).items():
        if isinstance(value, Tensor) and id(value) not in seen:
            seen.add(id(value))
            found[name] = value.detach()
    return found


def _tied_names(engine: EngineInformation) -> dict[str, str]:
    """The other names of the module's tensors, each with the one under which the tensor is stored."""
    model = engine.sharded_model
    first = {id(p): name for flat in (model.trained, model.frozen) for name, p in flat.parameters.items()}
    tensors = {n: v for n, v in engine.module.state_dict(keep_vars=True).items() if isinstance(v, Tensor)}
    return {name: first[id(value)] for name, value in tensors.items() if first.setdefault(id(value), name) != name}


def _small_states(engine: EngineInformation) -> dict[str, Any]:
    optimizer, scheduler = engine.optimizer, engine.lr_scheduler
    within_step = engine._accumulation.micro_steps
    if within_step and engine.communicator.rank == 0:
        logger.warning(
            "save_checkpoint between optimizer steps: the gradients of the last %d micro-steps are not saved", within_step
        )
    states: dict[str, Any] = {
        "counters": {**vars(engine.counters), "micro_steps": engine.counters.micro_steps - within_step},
        "dtype": str(engine._parts.precision.model_dtype or torch.float32).removeprefix("torch."),
        "scheduler": None,
        "optimizer": None,
    }
    if hasattr(scheduler, "state_dict"):
        states["scheduler"] = {"type": type(scheduler).__name__, "state": _plain(scheduler.state_dict())}
    if optimizer is not None:
        groups = optimizer.param_groups
        states["optimizer"] = {
            "type": type(optimizer.optimizer).__name__,
            "zero_stage": optimizer.policy.stage,
            "groups": [_plain({key: value for key, value in group.items() if key != "params"}) for group in groups],
            "members": _members(optimizer),
            "clip": engine.settings.gradient_clipping,
            "scaler": {"type": type(optimizer.scaler).__name__, "state": optimizer.scaler.state_dict()},
        }
    return states


def _members(optimizer: ShardedOptimizer) -> list[list[str]]:
    """The names of each group's parameters, in the model's order."""
    members: list[list[str]] = [[] for _ in optimizer.param_groups]
    for name in optimizer.flat.parameters:
        bucket, _ = optimizer.flat.layout.homes[name]
        members[bucket.group].append(name)
    return members


def _elementwise(optimizer: ShardedOptimizer, segment: Segment) -> dict[str, Tensor]:
    found = {}
    for kind, value in optimizer.state.get(segment.tensor, {}).items():
        if isinstance(value, Tensor) and value.dim() > 0:
            if not is_elementwise(value, segment.tensor):
                raise CheckpointError(
                    f"the state '{kind}' of {type(optimizer.optimizer).__name__} has shape {tuple(value.shape)} for "
                    f"{segment.tensor.numel()} elements: a checkpoint holds states of one value per element, and numbers"
                )
            found[kind] = value
    return found


def _numbers(optimizer: ShardedOptimizer) -> list[tuple[dict[str, Any], list[str]]]:
    """The states that are numbers, such as Adam's step, with the parameters whose states they are on this rank."""
    found = []
    for segment in optimizer.segments:
        state = optimizer.state.get(segment.tensor, {})
        numbers = {key: value for key, value in state.items() if isinstance(value, (bool, int, float))} | {
            key: {"tensor": value.item(), "dtype": str(value.dtype).removeprefix("torch.")}
            for key, value in state.items()
            if isinstance(value, Tensor) and value.dim() == 0
        }
        found.append((numbers, [fragment.spec.name for fragment in segment.fragments]))
    return found


def _joined(everyone: list[list[tuple[dict[str, Any], list[str]]]]) -> list[dict[str, Any]]:
    """The numbers of all ranks: each set of numbers with the names of all parameters that have it."""
    names_of: dict[str, set[str]] = {}
    for found in everyone:
        for numbers, names in found:
            if numbers:
                names_of.setdefault(json.dumps(numbers, sort_keys=True), set()).update(names)
    return [{"numbers": json.loads(numbers), "names": sorted(names)} for numbers, names in names_of.items()]


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


def _agreed_tag(tag: str, communicator: Communicator, validation: str) -> str:
    """Rank 0's tag, under which all ranks save. Where the tags differ, ``validation`` warn says so and fail raises
    ValueError on every rank."""
    tags = communicator.gather_objects(tag, purpose="agreement on the tag of a checkpoint to save")
    if validation != "ignore" and len(set(tags)) > 1:
        found = ", ".join(f"'{one}' on rank {rank}" for rank, one in enumerate(tags))
        if validation == "fail":
            raise ValueError(f"save_checkpoint was given different tags: {found}. Give the same one on every rank.")
        logger.warning("save_checkpoint was given different tags: %s. Saving under '%s'.", found, tags[0])
    return str(tags[0])
