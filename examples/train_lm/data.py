"""Text, a byte-level BPE tokenizer trained on it, and batches of tokens."""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor


@dataclass(frozen=True)
class Corpus:
    """A tokenizer with the tokens of the training and validation text (1-D, int64)."""

    tokenizer: Tokenizer
    training: Tensor
    validation: Tensor

    def batch(self, generator: torch.Generator, *, size: int, context: int, validation: bool = False) -> tuple[Tensor, Tensor]:
        """Random inputs and targets, each (size, context)."""
        tokens = self.validation if validation else self.training
        starts = torch.randint(len(tokens) - context - 1, (size,), generator=generator)
        windows = torch.stack([tokens[start : start + context + 1] for start in starts.tolist()])
        return windows[:, :-1], windows[:, 1:]


def find_files(source: str | None) -> list[Path]:
    """The text files of ``source`` (a file or directory), or Python's standard library where None."""
    if source is not None and not Path(source).exists():
        raise SystemExit(f"--data {source} does not exist; give a text file or a directory")
    root = Path(source) if source is not None else Path(sysconfig.get_paths()["stdlib"])
    if root.is_file():
        return [root]
    skipped = {"site-packages", "test", "tests", "idlelib"}
    pattern = "*" if source is not None else "*.py"
    return [p for p in sorted(root.rglob(pattern)) if p.is_file() and not skipped & set(p.relative_to(root).parts)]


def load_corpus(source: str | None, *, vocabulary: int, cache: Path) -> Corpus:
    """Tokenize the text, or take what an earlier run of the same text and vocabulary left in ``cache``.

    Every tenth file is held out; of a single file, its last tenth.
    """
    texts = [path.read_text(encoding="utf-8", errors="ignore") for path in find_files(source)]
    if len(texts) == 1:
        cut = len(texts[0]) * 9 // 10
        training, validation = texts[0][:cut], texts[0][cut:]
    else:
        training = "\n".join(text for index, text in enumerate(texts) if index % 10)
        validation = "\n".join(texts[::10])
    key = hashlib.sha256(f"{vocabulary}\n{training}\n{validation}".encode()).hexdigest()[:16]
    file = cache / f"{key}.pt"
    if not file.exists():
        cache.mkdir(parents=True, exist_ok=True)
        tokenizer = _train_tokenizer(training, vocabulary)
        tokenizer.save(str(file.with_suffix(".json")))
        encoded = [torch.tensor(tokenizer.encode(text).ids, dtype=torch.int32) for text in (training, validation)]
        temporary = file.with_suffix(".tmp")
        torch.save(encoded, temporary)
        temporary.rename(file)
    first, second = torch.load(file, weights_only=True)
    return Corpus(Tokenizer.from_file(str(file.with_suffix(".json"))), first.long(), second.long())


def _train_tokenizer(text: str, vocabulary: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    return tokenizer
