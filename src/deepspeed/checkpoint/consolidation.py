"""The fp32 weights of a checkpoint, whole: in memory, in a model, or in files that other programs load."""

from __future__ import annotations

import argparse
import os
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from .directory import CheckpointError, find_checkpoint, read_latest
from .opening import open_source
from .source import WEIGHT, Source, aliases, load_into, stored_dtype
from .weight_files import Weight, write_weights


def get_fp32_state_dict_from_zero_checkpoint(
    checkpoint_dir: str | os.PathLike[str], tag: str | None = None, exclude_frozen_parameters: bool = False
) -> OrderedDict[str, Tensor]:
    """The state dict of the model that was saved as ``checkpoint_dir/tag`` (the one that ``latest`` names where None), on
    CPU: 16-bit values in fp32, tied weights as one tensor. No process group is needed.

    Raises CheckpointError for a checkpoint that is not there or is damaged.
    """
    with open_checkpoint(checkpoint_dir, tag) as source:
        return _read(source, _wanted(source, exclude_frozen_parameters))


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

    What exceeds ``max_shard_size`` ("5GB", bytes, or None for no limit) goes into several files with an index. One tensor
    is in memory at a time.
    """
    name = "model.safetensors" if safe_serialization else "pytorch_model.bin"
    with open_checkpoint(checkpoint_dir, tag) as source:
        stored = {source.names[name] for name in _wanted(source, exclude_frozen_parameters)}
        weights = [_weight(source, name, names) for name, names in aliases(source).items() if name in stored]
        write_weights(Path(output_dir) / name, weights, max_shard_size)


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


def open_checkpoint(checkpoint_dir: str | os.PathLike[str], tag: str | None) -> Source:
    """The checkpoint ``checkpoint_dir/tag``, to read; the one that ``latest`` names where ``tag`` is None."""
    directory = Path(checkpoint_dir)
    found = tag or read_latest(directory)
    if found is None:
        raise CheckpointError(f"{directory} has no file 'latest'; give the tag of a checkpoint")
    return open_source(find_checkpoint(directory, found))


def _wanted(source: Source, exclude_frozen_parameters: bool) -> list[str]:
    left_out = set(source.index.get("frozen", ())) if exclude_frozen_parameters else set()
    return [name for name, stored in source.names.items() if stored not in left_out]


def _weight(source: Source, stored: str, names: Iterable[str]) -> Weight:
    """The tensor ``stored``, in fp32 where it is a shorter floating-point number."""
    dtype = stored_dtype(source, WEIGHT, stored)
    short = dtype.is_floating_point and dtype.itemsize < 4
    shape = source.shapes[stored]
    return Weight(
        tuple(names),
        shape,
        torch.float32 if short else dtype,
        lambda target: load_into(source, WEIGHT, stored, target),
    )


def _read(source: Source, names: Iterable[str]) -> OrderedDict[str, Tensor]:
    """The tensors of ``names``; those that are stored as one are one."""
    found: dict[str, Tensor] = {}
    state = OrderedDict()
    for name in names:
        stored = source.names[name]
        if stored not in found:
            weight = _weight(source, stored, [name])
            found[stored] = torch.empty(weight.shape, dtype=weight.dtype)
            weight.load(found[stored])
        state[name] = found[stored]
    return state
