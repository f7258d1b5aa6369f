"""The layout of the original DeepSpeed: ``*_model_states.pt`` and ``*_optim_states.pt`` (ZeRO stages 0 to 3), and the
universal one that is made of it.

- Stages 1 and 2: the parameters of a group end to end, padded at the end, cut into equal partitions, one in each rank's file.
  ``param_shapes`` in the model's file has the names in order.
- Stage 3: each parameter is cut into equal parts, padded at its end. A rank's file has its parts end to end, in one or more
  flat tensors.
- Stage 0: the optimizer's own state dict in the model's file, by number. The numbers' names follow from the shapes.
- Universal: a directory ``zero/<name>`` for each parameter, with a file for each of its tensors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

from torch import Tensor

from ...optim.schedules import WARMUP_COSINE_LR, WARMUP_DECAY_LR, WARMUP_LR
from ..directory import CheckpointError
from ..source import WEIGHT, Part
from .matching import names_of_states
from .pickles import LossScale, check_file, load_pickle
from .stored import Contents, ForeignCheckpoint, numbers_of

# fmt: off
INTERNAL = frozenset((
    "module", "buffer_names", "optimizer", "param_shapes", "frozen_param_shapes", "shared_params", "frozen_param_fragments",
    "lr_scheduler", "sparse_tensor_module_names", "data_sampler", "random_ltd", "skipped_steps", "global_steps",
    "global_samples", "dp_world_size", "mp_world_size", "checkpoint_parallel_dimensions", "ds_config", "ds_version",
    "iteration",
))
# fmt: on
"""Entries of the model's file that are the engine's; all others are the training program's."""

DEFAULT_CLIPPING = 1.0
"""The norm to which the original clips gradients where its configuration does not say."""

WARMUPS = (WARMUP_LR, WARMUP_DECAY_LR, WARMUP_COSINE_LR)

MODEL_FILES = "*mp_rank_*_model_states.pt"
OPTIMIZER_FILES = "*zero_pp_rank_*_mp_rank_*_optim_states.pt"
UNIVERSAL = "zero"


def is_original(path: Path) -> bool:
    """Whether the directory ``path`` has such files."""
    return any(path.glob(MODEL_FILES))


def is_universal(path: Path) -> bool:
    """Whether they are of the universal layout."""
    return is_original(path) and (path / UNIVERSAL).is_dir()


def read_original(path: Path) -> ForeignCheckpoint:
    """The checkpoint in ``path``. Raises CheckpointError where files are missing or damaged, or of several model-parallel
    ranks."""
    model_files, optimizer_files = files_by_rank(path, MODEL_FILES), files_by_rank(path, OPTIMIZER_FILES)
    models = [load_pickle(file) for file in model_files]
    optimizers = [load_pickle(file)["optimizer_state_dict"] for file in optimizer_files]
    contents = Contents()
    _add_small(contents, models[0])
    stage = int(optimizers[0]["zero_stage"]) if optimizers else 0
    if not is_universal(path):
        _require_all(path, optimizers, len(models), stage=stage, ranks=contents.ranks)
    _add_module(contents, models)
    if is_universal(path):
        optimizer_files = sorted((path / UNIVERSAL).rglob("*.pt"))
        _add_universal(contents, path / UNIVERSAL, models[0])
    elif stage == 3:
        _add_third_stage(contents, models[0]["param_shapes"], optimizers)
    elif optimizers:
        _add_partitions(contents, models[0]["param_shapes"], optimizers)
    elif models[0].get("optimizer"):
        _add_unsharded(contents, models[0].get("param_shapes"), models[0]["optimizer"], path)
    for name, shape in contents.shapes.items():
        if sum(part.numel for part in contents.parts[WEIGHT, name]) != prod(shape):
            raise CheckpointError(f"{path} is incomplete: it lacks elements of {name}")

    def check() -> None:
        for file in [*model_files, *optimizer_files]:
            check_file(file)

    return ForeignCheckpoint(path, contents, check)


def files_by_rank(path: Path, pattern: str) -> list[Path]:
    """The files in ``path`` of a pattern, in the order of the ranks. Raises CheckpointError where they are of several
    model-parallel ranks."""

    def numbers(file: Path) -> tuple[int, int]:
        model_parallel = re.search(r"mp_rank_(\d+)", file.name)
        shard = re.search(r"zero_pp_rank_(\d+)", file.name)
        return int(model_parallel[1]) if model_parallel else 0, int(shard[1]) if shard else 0

    files = sorted(path.glob(pattern), key=numbers)
    if files and numbers(files[-1])[0]:
        raise CheckpointError(f"{path} is of several model-parallel ranks ({files[-1].name}), which this package does not read")
    return files


def _require_all(path: Path, optimizers: Sequence[Any], models: int, *, stage: int, ranks: int) -> None:
    expected = ranks if stage else 0
    if len(optimizers) != expected or models != (ranks if stage == 3 else 1):
        raise CheckpointError(
            f"{path} is incomplete: it has files of {len(optimizers)} optimizers and {models} models, and was saved at stage "
            f"{stage} by {ranks} ranks"
        )


def _add_small(contents: Contents, model: Mapping[str, Any]) -> None:
    counters = {key: model[key] for key in ("global_steps", "global_samples", "skipped_steps") if model.get(key) is not None}
    config = model.get("ds_config") or {}
    accumulation = config.get("gradient_accumulation_steps") or 1
    if isinstance(accumulation, int) and "global_steps" in counters:
        counters["micro_steps"] = counters["global_steps"] * accumulation
    contents.counters = counters
    contents.ranks = int(model.get("dp_world_size") or 1)
    if model.get("lr_scheduler") is not None:
        schedule = (config.get("scheduler") or {}).get("type", "")
        contents.scheduler = {"type": schedule, "state": shifted(schedule, model["lr_scheduler"], by=-1)}
    contents.optimizer = (config.get("optimizer") or {}).get("type")
    clip = config.get("gradient_clipping", DEFAULT_CLIPPING)
    contents.clip = float(clip) if isinstance(clip, (int, float)) else DEFAULT_CLIPPING
    contents.dtype = "bfloat16" if (config.get("bf16") or {}).get("enabled") is True else "float32"
    contents.client = {key: value for key, value in model.items() if key not in INTERNAL}


def shifted(schedule: str, state: Mapping[str, Any], *, by: int) -> dict[str, Any]:
    """The state of a schedule here (``by`` -1) or there (1). The original's warm-up begins with two steps at its first value,
    so that after as many steps it is one iteration behind."""
    if schedule in WARMUPS and "last_batch_iteration" in state:
        return {**state, "last_batch_iteration": state["last_batch_iteration"] + by}
    return dict(state)


def _add_module(contents: Contents, models: Sequence[Mapping[str, Any]]) -> None:
    """The tensors of the model's file: all weights, or at stage 3 those that are not cut into parts, and the frozen ones."""
    first = models[0]
    trained = {name for shapes in first.get("param_shapes") or () for name in shapes}
    buffers = set(first.get("buffer_names") or ())
    frozen = first.get("frozen_param_shapes") or {}
    seen: dict[tuple[object, object], str] = {}
    for name, value in first["module"].items():
        if not isinstance(value, Tensor):
            continue
        # At stage 3 the parameters' places are empty; tied ones are of one storage all the same.
        placeholder = len(models) > 1 and name not in buffers and not value.numel()
        key = value.untyped_storage().data_ptr(), value.storage_offset()
        if key[0] and (placeholder or value.numel()) and seen.setdefault(key, name) != name:
            contents.tied[name] = seen[key]
        if placeholder or name in contents.tied:
            continue
        contents.shapes[name] = tuple(value.shape)
        contents.add_whole(WEIGHT, name, value, f"module.{name}")
        if trained and name not in trained and name not in buffers:
            contents.frozen.append(name)
    for name, shape in frozen.items():
        contents.shapes[name] = tuple(shape)
        contents.frozen.append(name)
        labels = [(f"rank {rank}: frozen {name}", model["frozen_param_fragments"][name]) for rank, model in enumerate(models)]
        _add_parts_of(contents, WEIGHT, name, labels)
    contents.tied.update(first.get("shared_params") or {})


def _add_parts_of(contents: Contents, kind: str, name: str, labelled: Iterable[tuple[str, Tensor]]) -> None:
    """A parameter in equal parts, one of each rank, the last ones padded."""
    left, parts = prod(contents.shapes[name]), []
    for label, tensor in labelled:
        contents.add_read(label, tensor)
        parts.append(Part(label, 0, min(left, tensor.numel())))
        left -= parts[-1].numel
    contents.parts[kind, name] = [part for part in parts if part.numel]


def _add_partitions(contents: Contents, shapes: Sequence[Mapping[str, Any]], ranks: Sequence[Mapping[str, Any]]) -> None:
    """Stages 1 and 2."""
    base = [rank["base_optimizer_state"] for rank in ranks]
    _add_options(contents, base[0], ranks[0])
    for group, named in enumerate(shapes):
        contents.members.append(list(named))
        contents.shapes |= {name: tuple(shape) for name, shape in named.items()}
        numbers = [(name, prod(shape)) for name, shape in named.items()]
        states = [_state_of(one, group) for one in base]
        flats = {WEIGHT: [rank["single_partition_of_fp32_groups"][group] for rank in ranks]}
        flats |= {kind: [state[kind] for state in states] for kind in _elementwise(states[0])}
        for kind, partitions in flats.items():
            for name, parts in _cut(contents, f"group {group}: {kind}", partitions, numbers):
                contents.parts[kind, name] = parts
        contents.numbers |= {name: numbers_of(states[0]) for name in named}


def _state_of(base: Any, group: int) -> Mapping[str, Any]:
    found = base["state"].get(group, {}) if isinstance(base, Mapping) else base[group]
    return found if isinstance(found, Mapping) else {}


def _elementwise(state: Mapping[str, Any]) -> list[str]:
    return [kind for kind, value in state.items() if isinstance(value, Tensor) and value.dim() > 0]


def _cut(
    contents: Contents, label: str, partitions: Sequence[Tensor], named: Iterable[tuple[str, int]]
) -> Iterator[tuple[str, list[Part]]]:
    """Parameters of so many elements, end to end in ``partitions``, which are end to end."""
    labels = [f"{label}, partition {index}" for index in range(len(partitions))]
    for one, tensor in zip(labels, partitions, strict=True):
        contents.add_read(one, tensor)
    index, at = 0, 0
    for name, numel in named:
        parts = []
        while numel and index < len(partitions):
            taken = min(numel, partitions[index].numel() - at)
            if taken:
                parts.append(Part(labels[index], at, taken))
            at, numel = at + taken, numel - taken
            if at == partitions[index].numel():
                index, at = index + 1, 0
        yield name, parts


def _add_third_stage(contents: Contents, shapes: Sequence[Mapping[str, Any]], ranks: Sequence[Mapping[str, Any]]) -> None:
    base = [rank["optimizer_state_dict"] for rank in ranks]
    _add_options(contents, base[0], ranks[0])
    named = {name: tuple(shape) for group in shapes for name, shape in group.items()}
    contents.members = [list(group) for group in shapes]
    contents.shapes |= named
    shares = [(name, -(-prod(shape) // len(ranks))) for name, shape in named.items()]
    for rank, own in enumerate(ranks):
        states = [_state_of(base[rank], index) for index in range(len(own["fp32_flat_groups"]))]
        flats = {WEIGHT: own["fp32_flat_groups"]}
        flats |= {kind: [state[kind] for state in states] for kind in _elementwise(states[0])}
        for kind, tensors in flats.items():
            for name, parts in _cut(contents, f"rank {rank}: {kind}", tensors, shares):
                left = prod(named[name]) - sum(part.numel for part in contents.parts[kind, name])
                for part in parts:
                    if min(left, part.numel) > 0:
                        contents.parts[kind, name].append(Part(part.piece, part.start, min(left, part.numel)))
                    left -= part.numel
        contents.numbers |= {name: numbers_of(states[0]) for name in named}


def _given_names(numbers: Sequence[Sequence[int]], shapes: Sequence[Iterable[str]]) -> dict[int, str]:
    found: dict[int, str] = {}
    for group, names in zip(numbers, shapes, strict=True):
        found.update(zip(group, names, strict=True))
    return found


def _add_unsharded(
    contents: Contents, shapes: Sequence[Mapping[str, Any]] | None, saved: Mapping[str, Any], path: Path
) -> None:
    """Stage 0: the state dict of an optimizer, in 16 bits with fp32 copies of the weights beside it."""
    base = saved.get("optimizer_state_dict", saved)
    _add_options(contents, base, saved)
    numbers = [list(group["params"]) for group in base["param_groups"]]
    masters: dict[int, Tensor] = {}
    for group, tensors in zip(numbers, saved.get("fp32_groups") or (), strict=False):
        masters.update(zip(group, tensors, strict=True))
    states = base["state"]
    shape_of = {number: tuple(states[number][kind].shape) for number in states for kind in _elementwise(states[number])[:1]}
    shape_of |= {number: tuple(tensor.shape) for number, tensor in masters.items()}
    # The original's files do not say the names; those that this package wrote do.
    names = _given_names(numbers, shapes) if shapes else names_of_states(numbers, shape_of, contents.shapes, path)
    contents.members = [[names[number] for number in group if number in names] for group in numbers]
    for number, name in names.items():
        contents.add_states(name, states.get(number, {}), f"state {number}")
        if number in masters:
            contents.add_whole(WEIGHT, name, masters[number], f"master {number}")


def _add_universal(contents: Contents, folder: Path, model: Mapping[str, Any]) -> None:
    named = {name: tuple(shape) for group in model["param_shapes"] for name, shape in group.items()}
    contents.shapes |= named
    contents.members = [list(group) for group in model["param_shapes"]]
    saved = load_pickle(folder / "optimizer_state.pt")
    base = saved.get("base_optimizer_state") or saved["optimizer_state_dict"]
    _add_options(contents, base, saved)
    for index, group in enumerate(contents.members):
        for name in group:
            for file in sorted((folder / name).glob("*.pt")):
                value = load_pickle(file)
                value = value.get("param") if isinstance(value, Mapping) else value
                kind = WEIGHT if file.stem == "fp32" else file.stem
                if isinstance(value, Tensor) and value.numel() == prod(named[name]) and kind != "step":
                    contents.add_whole(kind, name, value, f"{name}/{file.name}")
            contents.numbers[name] = numbers_of(_state_of(base, index) or _state_of(base, 0))


def _add_options(contents: Contents, base: Any, saved: Mapping[str, Any]) -> None:
    if isinstance(base, Mapping):
        plain = (bool, int, float, str, list, tuple)
        contents.groups = [
            {key: value for key, value in group.items() if key != "params" and isinstance(value, plain)}
            for group in base["param_groups"]
        ]
    contents.stage = int(saved["zero_stage"]) if "zero_stage" in saved else 0
    scaler = saved.get("loss_scaler")
    if isinstance(scaler, LossScale) and saved.get("dynamic_loss_scale"):
        contents.scale = {"scale": float(vars(scaler)["cur_scale"])}
