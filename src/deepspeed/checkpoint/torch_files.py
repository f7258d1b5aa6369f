"""A checkpoint's small states in ``torch.save`` files, for programs that open the files of a checkpoint themselves.

Lightning's conversion of a checkpoint asks for the optimizer's file, reads the ZeRO stage in it, asks for the model's, and
keeps what the training had put into ``client_state``. The files are written when they are asked for: a checkpoint itself
has no pickles. Weights and optimizer states are not in them; they are in the checkpoint's safetensors.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from ..version import __version__
from .directory import INDEX, CheckpointError
from .foreign.zero import MODEL_FILES, OPTIMIZER_FILES, files_by_rank, is_original
from .reader import CheckpointReader

MODEL_STATES = "mp_rank_00_model_states.pt"
OPTIMIZER_STATES = "zero_pp_rank_0_mp_rank_00_optim_states.pt"


def get_optim_files(checkpoint_dir: str | os.PathLike[str]) -> list[str]:
    """The file with ``optimizer_state_dict.zero_stage`` and ``.partition_count``; ``checkpoint_dir`` is the directory of
    one checkpoint, such as ``checkpoints/global_step100``. Raises CheckpointError for one without optimizer states."""
    if is_original(Path(checkpoint_dir)) and not (Path(checkpoint_dir) / INDEX).exists():
        return [str(path) for path in files_by_rank(Path(checkpoint_dir), OPTIMIZER_FILES)]
    with CheckpointReader(Path(checkpoint_dir)) as reader:
        saved = reader.index["optimizer"]
        if saved is None:
            raise CheckpointError(f"{reader.path} has no optimizer states: it is of an engine without an optimizer")
        states = {"zero_stage": saved["zero_stage"], "partition_count": reader.index["ranks"]}
        return [_write(reader, OPTIMIZER_STATES, {"optimizer_state_dict": states})]


def get_model_state_file(checkpoint_dir: str | os.PathLike[str], zero_stage: int) -> str:
    """The file with the engine's counters and what ``save_checkpoint`` was given as ``client_state``, the same at every
    ``zero_stage``."""
    if is_original(Path(checkpoint_dir)) and not (Path(checkpoint_dir) / INDEX).exists():
        return str(files_by_rank(Path(checkpoint_dir), MODEL_FILES)[0])
    with CheckpointReader(Path(checkpoint_dir)) as reader:
        counters = reader.index["counters"]
        return _write(reader, MODEL_STATES, {**counters, "dp_world_size": reader.index["ranks"], **reader.client_state()})


def _write(reader: CheckpointReader, name: str, content: dict[str, Any]) -> str:
    path = reader.path / name
    temporary = path.with_name(f".{name}")
    torch.save({"ds_version": __version__, **content}, temporary)
    temporary.replace(path)
    return str(path)
