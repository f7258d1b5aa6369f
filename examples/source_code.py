"""Source code that is on every machine with Python and PyTorch, as windows of bytes: a byte is a token."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

VOCABULARY = 256

PYTHON = (Path(sysconfig.get_paths()["stdlib"]), "*.py")
"""Python's standard library."""

HEADERS = (Path(torch.__file__).parent / "include" / "torch" / "csrc", "**/*.h")
"""PyTorch's own C++ headers."""


class SourceCode(Dataset[dict[str, Tensor]]):
    """Windows of ``context`` bytes, end to end, over the files of ``language``; every tenth file is held out.

    Of more than ``limit`` windows that many are taken, evenly spread. An item has ``input_ids`` and ``labels``, both the
    window (int64): models of Transformers shift the labels themselves.
    """

    def __init__(self, language: tuple[Path, str], context: int, *, held_out: bool = False, limit: int = 100_000) -> None:
        text = bytearray(source_of(language, held_out=held_out))
        self.windows = windows_of(torch.frombuffer(text, dtype=torch.uint8), context, limit=limit)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        window = self.windows[index].long()
        return {"input_ids": window, "labels": window}


def source_of(language: tuple[Path, str], *, held_out: bool) -> bytes:
    """The files of ``language``, joined: every tenth one where ``held_out``, else the others."""
    root, pattern = language
    files = [path for path in sorted(root.glob(pattern)) if path.is_file()]
    return b"\n".join(path.read_bytes() for index, path in enumerate(files) if (index % 10 == 0) == held_out)


def windows_of(tokens: Tensor, context: int, *, limit: int) -> Tensor:
    """``tokens`` (1-D) in rows of ``context``, end to end; of more than ``limit`` that many, evenly spread."""
    windows = tokens[: len(tokens) // context * context].view(-1, context)
    count = min(limit, len(windows))
    return windows[torch.arange(count) * len(windows) // count]


def encoded(text: str) -> Tensor:
    """The bytes of ``text`` as one sequence, (1, length)."""
    return torch.tensor([list(text.encode())])


def decoded(tokens: Tensor) -> str:
    """The text of a sequence of bytes."""
    return bytes(tokens.tolist()).decode(errors="replace")
