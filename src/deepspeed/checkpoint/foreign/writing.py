"""Writing the layout of the original DeepSpeed (``zero.py`` says what it is), so that programs which read its files, the
original itself among them, read what was trained here.
"""

from __future__ import annotations

import os
import pickle
import shutil
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ...version import __version__
from ..directory import CheckpointError
from ..reader import Part
from ..script import write_script
from ..source import WEIGHT, Source, stored_dtype
from ..weight_files import scratch
from .pickles import STAND_INS, FragmentAddress, LossScale, ZeroStage
from .zero import shifted

Empty = Callable[[Sequence[int], torch.dtype], Tensor]


# The pickler in Python: that in C does not let a class be named otherwise.
_PurePickler: Any = pickle._Pickler


class _Pickler(_PurePickler):
    """Names the original's classes where an object is a stand-in for one."""

    def save_global(self, obj: Any, name: str | None = None) -> None:
        original = next((of for stand_in, of in STAND_INS if stand_in is obj and of.startswith("deepspeed.")), None)
        if original is None:
            super().save_global(obj, name)
            return
        module, _, label = original.rpartition(".")
        self.write(pickle.GLOBAL + f"{module}\n{label}\n".encode())
        self.memoize(obj)


_PICKLE = SimpleNamespace(__name__=__name__, Pickler=_Pickler, dumps=pickle.dumps, dump=pickle.dump)


@dataclass(frozen=True)
class Layout:
    """How many ranks and which stage the files are for; ``groups`` are the names of the trained parameters of each group."""

    ranks: int
    stage: int
    dtype: torch.dtype
    groups: tuple[tuple[str, ...], ...]

    @staticmethod
    def of(source: Source) -> Layout:
        """The layout as which ``source`` was trained. Raises CheckpointError where it does not say which parameters were in
        which group."""
        optimizer = source.index["optimizer"]
        if optimizer is None:
            raise CheckpointError(f"{source.path} has no optimizer states: the original's layout is for training to go on")
        members = optimizer.get("members") or []
        if not members and len(optimizer["groups"]) == 1:
            members = [[name for name in source.shapes if source.kinds(name) > {WEIGHT}]]
        if len(members) != len(optimizer["groups"]):
            raise CheckpointError(f"{source.path} does not say which parameters are in which of its optimizer's groups")
        dtype = getattr(torch, source.index.get("dtype") or "float32")
        return Layout(source.index["ranks"], optimizer["zero_stage"], dtype, tuple(map(tuple, members)))

    @property
    def trained(self) -> list[str]:
        """All trained parameters, group by group."""
        return [name for group in self.groups for name in group]


def write_original(source: Source, directory: Path, tag: str) -> Path:
    """Write all ranks' files as ``directory/tag`` and make it the latest; returns the path."""
    temporary = directory / f".{tag}.saving"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    layout = Layout.of(source)
    for rank in range(layout.ranks):
        write_rank(source, temporary, layout, rank)
    if (directory / tag).exists():
        raise CheckpointError(f"{directory / tag} exists: give another directory")
    temporary.rename(directory / tag)
    write_script(directory)
    (directory / "latest").write_text(tag)
    return directory / tag


def write_rank(source: Source, folder: Path, layout: Layout, rank: int) -> None:
    """Write into ``folder`` the files that the rank ``rank`` of the original would write. Its tensors are in files meanwhile,
    and not in memory."""
    stage = layout.stage
    prefix = "bf16_" if layout.dtype is torch.bfloat16 else ""
    with scratch(folder) as empty:
        if stage == 3 or rank == 0:
            shard = f"zero_pp_rank_{rank}_" if stage == 3 else ""
            _save(folder / f"{shard}mp_rank_00_model_states.pt", _model_states(source, layout, rank, empty))
        if stage:
            states: dict[str, Any] = {"optimizer_state_dict": _optimizer_states(source, layout, rank, empty)}
            states |= {"ds_config": _config(source, layout), "ds_version": __version__}
            _save(folder / f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt", states)


def _save(path: Path, content: Any) -> None:
    torch.save(content, path, pickle_module=_PICKLE)
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _model_states(source: Source, layout: Layout, rank: int, empty: Empty) -> dict[str, Any]:
    index, trained = source.index, set(layout.trained)
    frozen = [name for name in index["frozen"] if name in source.shapes]
    module: OrderedDict[str, Tensor] = OrderedDict()
    for name, stored in source.names.items():
        if stored in module:
            module[name] = module[stored]
        elif layout.stage == 3 and (stored in trained or stored in frozen):
            module[name] = torch.empty(0, dtype=layout.dtype)
        else:
            dtype = layout.dtype if stored in trained else stored_dtype(source, WEIGHT, stored)
            module[name] = _range(source, WEIGHT, stored, None, empty, dtype).view(source.shapes[stored])
    parameters = trained.union(frozen)
    shapes = [OrderedDict((name, torch.Size(source.shapes[name])) for name in group) for group in layout.groups]
    share = {name: -(-prod(source.shapes[name]) // layout.ranks) for name in frozen}
    fragments = OrderedDict(
        (name, _range(source, WEIGHT, name, (rank * share[name], share[name]), empty)) for name in frozen if layout.stage == 3
    )
    return {
        "module": module,
        "buffer_names": [name for name in source.shapes if name not in parameters],
        "optimizer": None if layout.stage else _unsharded(source, layout, empty),
        "param_shapes": shapes,
        "frozen_param_shapes": OrderedDict((name, torch.Size(source.shapes[name])) for name in fragments) or None,
        "shared_params": {},
        "frozen_param_fragments": fragments or None,
        "lr_scheduler": shifted(index["scheduler"]["type"], index["scheduler"]["state"], by=1) if index["scheduler"] else None,
        "data_sampler": None,
        "random_ltd": None,
        "skipped_steps": index["counters"].get("skipped_steps", 0),
        "global_steps": index["counters"].get("global_steps", 0),
        "global_samples": index["counters"].get("global_samples", 0),
        "dp_world_size": layout.ranks,
        "mp_world_size": 1,
        "ds_config": _config(source, layout),
        "ds_version": __version__,
        **source.client_state(),
    }


def _config(source: Source, layout: Layout) -> dict[str, Any]:
    """What a reader can not find elsewhere in the files."""
    index = source.index
    steps, micro_steps = (index["counters"].get(key, 0) for key in ("global_steps", "micro_steps"))
    return {
        "optimizer": {"type": index["optimizer"]["type"]},
        **({"scheduler": {"type": index["scheduler"]["type"]}} if index["scheduler"] else {}),
        "gradient_clipping": float(index["optimizer"].get("clip", 0.0)),
        "gradient_accumulation_steps": max(1, micro_steps // steps if steps else 1),
        "zero_optimization": {"stage": layout.stage},
        "bf16": {"enabled": layout.dtype is torch.bfloat16},
        "fp16": {"enabled": layout.dtype is torch.float16},
    }


def _range(
    source: Source,
    kind: str,
    name: str,
    where: tuple[int, int] | None,
    empty: Empty,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Elements from ``where[0]`` on, ``where[1]`` of them, or all; zeros where the tensor has ended."""
    total = prod(source.shapes[name])
    start, numel = where or (0, total)
    target = empty((numel,), dtype or stored_dtype(source, kind, name))
    _fill(source, target, 0, source.parts(kind, name, start, max(0, min(numel, total - start))))
    return target


def _fill(source: Source, target: Tensor, at: int, parts: Iterable[Part]) -> None:
    taken = list(parts)
    source.verify(part.piece for part in taken)
    for part in taken:
        target[at : at + part.numel] = source.read_part(part)
        at += part.numel


def _unsharded(source: Source, layout: Layout, empty: Empty) -> dict[str, Any]:
    numbers = {name: number for number, name in enumerate(layout.trained)}
    states = {}
    for name, number in numbers.items():
        found = {k: _range(source, k, name, None, empty).view(source.shapes[name]) for k in _kinds(source, [name])}
        if found:
            states[number] = {**_numbers(source, name), **found}
    groups = [
        {**_options(options), "params": [numbers[name] for name in names]}
        for options, names in zip(source.index["optimizer"]["groups"], layout.groups, strict=True)
    ]
    base = {"state": states, "param_groups": groups}
    if layout.dtype is torch.float32:
        return base
    masters = [[_range(source, WEIGHT, n, None, empty).view(source.shapes[n]) for n in names] for names in layout.groups]
    steps = source.index["counters"].get("global_steps", 0)
    return {
        "dynamic_loss_scale": False,
        "cur_scale": source.index["optimizer"]["scaler"]["state"].get("scale", 1.0),
        "cur_iter": steps,
        "optimizer_state_dict": base,
        "fp32_groups": masters,
    }


def _optimizer_states(source: Source, layout: Layout, rank: int, empty: Empty) -> dict[str, Any]:
    scaler = source.index["optimizer"]["scaler"]
    dynamic = scaler["type"] == "DynamicLossScaler"
    common = {
        "zero_stage": ZeroStage(layout.stage),
        "loss_scaler": _attributes(LossScale(), cur_scale=float(scaler["state"].get("scale", 1.0)), dynamic=dynamic),
        "dynamic_loss_scale": dynamic,
        "overflow": False,
    }
    share = _third_stage_share if layout.stage == 3 else _partition
    states, masters, addresses, paddings = {}, [], [], []
    for number, names in enumerate(layout.groups):
        numel, places = share(source, names, layout.ranks, rank)
        own: dict[str, Tensor] = {}
        for kind in [WEIGHT, *_kinds(source, names)]:
            own[kind] = empty((numel,), torch.float32)
            for name, start, at, size in places:
                _fill(source, own[kind], at, source.parts(kind, name, start, size))
        used = max((at + size for _, _, at, size in places), default=0)
        masters.append(own.pop(WEIGHT) if layout.stage == 3 else own.pop(WEIGHT)[:used])
        states[number] = {**_numbers(source, names[0]), **own} if own else {}
        paddings.append(numel - used)
        addresses.append(OrderedDict((n, _attributes(FragmentAddress(), numel=s, start=at)) for n, _, at, s in places))
    groups = [{**_options(options), "params": [n]} for n, options in enumerate(source.index["optimizer"]["groups"])]
    base = {"state": {number: state for number, state in states.items() if state}, "param_groups": groups}
    if layout.stage == 3:
        return {**common, "partition_count": layout.ranks, "optimizer_state_dict": base, "fp32_flat_groups": masters}
    return {
        **common,
        "base_optimizer_state": base,
        "single_partition_of_fp32_groups": masters,
        "group_paddings": paddings,
        "param_alignment_paddings": [[0] * len(names) for names in layout.groups],
        "partition_count": [layout.ranks] * len(layout.groups),
        # What is read here counts for the original, whatever its configuration says.
        "clip_grad": float(source.index["optimizer"].get("clip", 0.0)),
        "ds_version": __version__,
        "param_slice_mappings": addresses,
    }


Places = list[tuple[str, int, int, int]]
"""Parameters with the first of their elements, where these go, and how many they are."""


def _partition(source: Source, names: Sequence[str], ranks: int, rank: int) -> tuple[int, Places]:
    """A rank's share of parameters end to end, padded to a multiple of twice the ranks."""
    total = sum(prod(source.shapes[name]) for name in names)
    numel = -(-total // (2 * ranks)) * 2
    first, places, begin = rank * numel, [], 0
    for name in names:
        size = prod(source.shapes[name])
        start, stop = max(begin, first), min(begin + size, first + numel)
        if start < stop:
            places.append((name, start - begin, start - first, stop - start))
        begin += size
    return numel, places


def _third_stage_share(source: Source, names: Sequence[str], ranks: int, rank: int) -> tuple[int, Places]:
    """A rank's parts of each parameter, end to end, each padded."""
    places, at = [], 0
    for name in names:
        total = prod(source.shapes[name])
        share = -(-total // ranks)
        size = max(0, min(share, total - rank * share))
        if size:
            places.append((name, rank * share, at, size))
        at += share
    return at, places


def _kinds(source: Source, names: Iterable[str]) -> list[str]:
    return sorted(set().union(*(source.kinds(name) for name in names)) - {WEIGHT})


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in group.items()}


def _numbers(source: Source, name: str) -> dict[str, Any]:
    """The optimizer states of ``name`` that are numbers."""
    for entry in source.index["optimizer"].get("parameters", ()):
        if name in entry["names"]:
            return {
                key: torch.tensor(value["tensor"], dtype=getattr(torch, value["dtype"])) if isinstance(value, dict) else value
                for key, value in entry["numbers"].items()
            }
    return {}


def _attributes(record: Any, **attributes: Any) -> Any:
    vars(record).clear()
    vars(record).update(attributes)
    return record
