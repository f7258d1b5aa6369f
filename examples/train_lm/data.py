"""Text, a byte-level BPE tokenizer trained on it, and batches of tokens."""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

NOT_THE_LIBRARY = {"site-packages", "test", "tests", "idlelib"}
"""Folders under the standard library's that are left out."""


@dataclass(frozen=True)
class Corpus:
    """A tokenizer with the tokens of the training and validation text (1-D, int64). ``key`` identifies both."""

    key: str
    tokenizer: Tokenizer
    training: Tensor
    validation: Tensor

    def windows(self, *, seed: int, size: int, context: int, validation: bool = False) -> tuple[Tensor, Tensor]:
        """``size`` windows at random places: inputs and targets, each (size, context). One seed, one result."""
        tokens = self.validation if validation else self.training
        starts = torch.randint(len(tokens) - context, (size,), generator=torch.Generator().manual_seed(seed))
        windows = torch.stack([tokens[start : start + context + 1] for start in starts.tolist()])
        return windows[:, :-1], windows[:, 1:]


def load_corpus(text: str | None, *, vocabulary: int, context: int, cache: Path) -> Corpus:
    """Tokenize ``text`` (a file or folder; the standard library's source where None), or take what an earlier run of the
    same text and vocabulary left in ``cache``.

    Every tenth file is held out; of a single file, its last tenth. Raises SystemExit where there is no text or too little.
    """
    training, validation = _read(text)
    key = hashlib.sha256(f"{vocabulary}\n{training}\n{validation}".encode()).hexdigest()[:16]
    file = cache / f"{key}.pt"
    if not file.exists():
        _tokenize(training, validation, vocabulary, file)
    tokens = [tensor.long() for tensor in torch.load(file, weights_only=True)]
    for name, split in zip(("training", "validation"), tokens, strict=True):
        if len(split) <= context:
            raise SystemExit(
                f"the text is too short: {len(split)} tokens for {name}, where one window takes {context + 1}; "
                "give more text with --text, or a smaller --context"
            )
    return Corpus(key, Tokenizer.from_file(str(file.with_suffix(".json"))), *tokens)


def _read(text: str | None) -> tuple[str, str]:
    """The training and the validation text."""
    root = Path(sysconfig.get_paths()["stdlib"] if text is None else text)
    if not root.exists():
        raise SystemExit(f"--text {text}: there is no such file or folder")
    if root.is_file():
        whole = root.read_text(encoding="utf-8", errors="ignore")
        cut = len(whole) * 9 // 10
        return whole[:cut], whole[cut:]
    files = sorted(path for path in root.rglob("*.py" if text is None else "*") if path.is_file())
    if text is None:
        files = [path for path in files if not NOT_THE_LIBRARY & set(path.relative_to(root).parts)]
    texts = [path.read_text(encoding="utf-8", errors="ignore") for path in files]
    return "\n".join(text for index, text in enumerate(texts) if index % 10), "\n".join(texts[::10])


def _tokenize(training: str, validation: str, vocabulary: int, file: Path) -> None:
    """Train a tokenizer on every fourth line of the training text, and write it and the tokens of both."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(training.splitlines(keepends=True)[::4], trainer)
    tokens = [torch.tensor(tokenizer.encode(text).ids, dtype=torch.int32) for text in (training, validation)]
    file.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(file.with_suffix(".json")))
    temporary = file.with_suffix(".part")  # an interrupted run leaves no half a file under the final name
    torch.save(tokens, temporary)
    temporary.rename(file)
