"""The fp32 weights of a checkpoint, whole: in memory, in a model, or in files that other programs load."""

from __future__ import annotations

import argparse
import json
import os
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from .directory import CheckpointError, find_checkpoint, read_latest
from .reader import WEIGHT, CheckpointReader

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def get_fp32_state_dict_from_zero_checkpoint(
    checkpoint_dir: str | os.PathLike[str], tag: str | None = None, exclude_frozen_parameters: bool = False
) -> OrderedDict[str, Tensor]:
    """The state dict of the model that was saved as ``checkpoint_dir/tag`` (the one that ``latest`` names where None), on
    CPU: 16-bit values in fp32, tied weights as one tensor. No process group is needed.

    Raises CheckpointError for a checkpoint that is not there or is damaged.
    """
    with open_checkpoint(checkpoint_dir, tag) as reader:
        return _read(reader, _wanted(reader, exclude_frozen_parameters))


def convert_zero_checkpoint_to_fp32_state_dict(
    checkpoint_dir: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    max_shard_size: int | str | None = "5GB",
    safe_serialization: bool = False,
    tag: str | None = None,
    exclude_frozen_parameters: bool = False,
) -> None:
    """Write the state dict to ``output_dir``, under the names by which Transformers' ``from_pretrained`` finds weights:
    ``pytorch_model.bin``, or ``model.safetensors`` with ``safe_serialization``.

    What exceeds ``max_shard_size`` ("5GB", bytes, or None for no limit) goes into several files with an index. One file's
    tensors are in memory at a time.
    """
    folder = Path(output_dir)
    stem, suffix = ("model", "safetensors") if safe_serialization else ("pytorch_model", "bin")
    with open_checkpoint(checkpoint_dir, tag) as reader:
        shards = _split(reader, _wanted(reader, exclude_frozen_parameters), parse_size(max_shard_size))
        folder.mkdir(parents=True, exist_ok=True)
        homes, total = {}, 0
        for number, names in enumerate(shards, start=1):
            part = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
            file = f"{stem}{part}.{suffix}"
            state = _read(reader, names)
            _write(folder / file, state)
            homes.update(dict.fromkeys(names, file))
            total += sum(tensor.nbytes for tensor in {id(tensor): tensor for tensor in state.values()}.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": homes}
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index, indent=2) + "\n")


def load_state_dict_from_zero_checkpoint(
    model: nn.Module, checkpoint_dir: str | os.PathLike[str], tag: str | None = None
) -> nn.Module:
    """``model`` on CPU with the checkpoint's weights, in the model's own dtypes. Names that either side lacks are left
    alone, as frozen parameters that a checkpoint leaves out are."""
    state = get_fp32_state_dict_from_zero_checkpoint(checkpoint_dir, tag)
    model = model.cpu()
    model.load_state_dict(state, strict=False)
    return model


def main(arguments: Sequence[str] | None = None) -> None:
    """The program ``zero_to_fp32.py``."""
    parser = argparse.ArgumentParser(description="Write the fp32 weights of a checkpoint to files that other programs load.")
    parser.add_argument("checkpoint_dir", help="the directory with the file 'latest', such as checkpoint-100")
    parser.add_argument("output_dir", help="where pytorch_model.bin or model.safetensors goes")
    parser.add_argument("-t", "--tag", help="the checkpoint, such as global_step100 (default: what 'latest' names)")
    parser.add_argument("--max_shard_size", default="5GB", help="most bytes of one file (default: %(default)s)")
    parser.add_argument("--safe_serialization", action="store_true", help="write safetensors")
    parser.add_argument("--exclude_frozen_parameters", action="store_true", help="leave out what was not trained")
    given = parser.parse_args(arguments)
    try:
        convert_zero_checkpoint_to_fp32_state_dict(**vars(given))
    except (CheckpointError, OSError, ValueError) as error:
        raise SystemExit(f"{parser.prog}: {error}") from None
    print(f"the fp32 weights are in {given.output_dir}")


def open_checkpoint(checkpoint_dir: str | os.PathLike[str], tag: str | None) -> CheckpointReader:
    """A reader of ``checkpoint_dir/tag``; of the one that ``latest`` names where ``tag`` is None."""
    directory = Path(checkpoint_dir)
    found = tag or read_latest(directory)
    if found is None:
        raise CheckpointError(f"{directory} has no file 'latest'; give the tag of a checkpoint")
    return CheckpointReader(find_checkpoint(directory, found))


def parse_size(size: int | str | None) -> float:
    """Bytes, from a number, "500MB", "5GB" and the like; None is no limit."""
    if size is None or isinstance(size, int):
        return float("inf") if size is None else size
    text = size.strip().upper()
    number, unit = (text[:-2], UNITS[text[-2:]]) if text[-2:] in UNITS else (text, 1)
    try:
        return float(number) * unit
    except ValueError:
        raise ValueError(f"'{size}' is not a size; write bytes, or a number with {', '.join(UNITS)}: 5GB") from None


def _wanted(reader: CheckpointReader, exclude_frozen_parameters: bool) -> list[str]:
    left_out = set(reader.index.get("frozen", ())) if exclude_frozen_parameters else set()
    return [name for name, stored in reader.names.items() if stored not in left_out]


def _read(reader: CheckpointReader, names: Iterable[str]) -> OrderedDict[str, Tensor]:
    """The tensors of ``names``; those that are stored as one are one."""
    found: dict[str, Tensor] = {}
    state = OrderedDict()
    for name in names:
        stored = reader.names[name]
        if stored not in found:
            numel = torch.Size(reader.shapes[stored]).numel()
            reader.verify(part.piece for part in reader.parts(WEIGHT, stored, 0, numel))
            tensor = reader.whole(stored)
            found[stored] = tensor.float() if tensor.is_floating_point() and tensor.itemsize < 4 else tensor
        state[name] = found[stored]
    return state


def _split(reader: CheckpointReader, names: Sequence[str], limit: float) -> list[list[str]]:
    """``names`` in runs of at most ``limit`` bytes, but for larger tensors, each a run of its own. The names of one tensor
    stay together."""
    together: dict[str, list[str]] = {}
    for name in names:
        together.setdefault(reader.names[name], []).append(name)
    shards: list[list[str]] = [[]]
    filled = 0
    for stored, aliases in together.items():
        nbytes = 4 * torch.Size(reader.shapes[stored]).numel()
        if shards[-1] and filled + nbytes > limit:
            shards.append([])
            filled = 0
        shards[-1] += aliases
        filled += nbytes
    return shards


def _write(path: Path, state: OrderedDict[str, Tensor]) -> None:
    temporary = path.with_name(f".{path.name}.saving")
    if path.suffix == ".safetensors":
        # Safetensors holds a tied weight once for each of its names.
        save_file({name: tensor.clone() for name, tensor in state.items()}, temporary, metadata={"format": "pt"})
    else:
        torch.save(state, temporary)
    temporary.replace(path)
