"""Reading the pickles of others without running anything in them.

A pickle names the classes of its objects. ``torch.load(weights_only=True)`` makes tensors and plain values, and of other
classes those that a list allows. Here that list has stand-ins: plain data, in place of the classes of the program that wrote
the file.
"""

from __future__ import annotations

import argparse
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..directory import CheckpointError


class Record:
    """An object of a foreign class: what it was made from, and its attributes."""

    arguments: tuple[Any, ...] = ()

    def __init__(self, *arguments: Any):
        self.arguments = arguments


class ZeroStage(Record):
    """``ZeroStageEnum(stage)``; as an integer, the stage."""

    def __reduce__(self) -> tuple[Any, ...]:
        return ZeroStage, self.arguments

    def __int__(self) -> int:
        return int(self.arguments[0])


class LossScale(Record):
    """A loss scaler, by its attributes."""


class FragmentAddress(Record):
    """Where in a rank's partition a parameter's part is: ``numel`` elements from ``start`` on."""

    numel: int
    start: int



STAND_INS: tuple[tuple[Callable[..., Any], str], ...] = (
    (ZeroStage, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (LossScale, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (LossScale, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (FragmentAddress, "deepspeed.utils.tensor_fragment.fragment_address"),
    (argparse.Namespace, "argparse.Namespace"),
    (set, "builtins.set"),
)
"""What is made of each allowed class."""


def load_pickle(path: Path) -> Any:
    """What ``torch.save`` wrote to ``path``, on CPU, its tensors in the file until they are read.

    Raises CheckpointError for a damaged file, and for one with objects of classes that are not allowed.
    """
    try:
        with torch.serialization.safe_globals(list(STAND_INS)):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        reason = str(error).replace("\n", " ")
        at = reason.find("GLOBAL")
        raise CheckpointError(
            f"{path} has objects that are not data, and is not read ({reason[at:][:150] if at >= 0 else reason[:150]}): "
            "tensors, numbers, strings, lists and dictionaries are"
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        raise CheckpointError(f"{path} is missing or damaged: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """What an error says, without what torch adds below."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def check_file(path: Path) -> None:
    """Raise CheckpointError where the bytes of a file of ``torch.save`` are not those that were written."""
    try:
        with zipfile.ZipFile(path) as content:
            damaged = content.testzip()
    except (OSError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path} is missing or damaged: {error}") from error
    if damaged is not None:
        raise CheckpointError(f"{path} is damaged: the checksum of {damaged} is not that of its bytes")
