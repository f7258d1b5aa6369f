"""The examples of the documentation: fenced blocks. The words after the fence, which no reader sees, say what is done
with each; a block without them fails.

================================  ======================================================================================
``python``                        runs on two ranks, after the page's earlier ones and in one namespace with them
``json``                          a configuration: a small model trains with it on two ranks
``sh``                            a script for bash
``sh run=dry``                    commands for other hosts, for accelerators or for many minutes: they are only planned
``text``                          what the block before it prints; with ``figures=vary``, but for the numbers
any, ``file=NAME``                stands in a file of this name beside the page's other examples
any, ``needs=WHAT``               does not run here
================================  ======================================================================================
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
LANGUAGES = ("python", "json", "sh", "text")

_FENCE = re.compile(r"^```(?P<words>.*)\n(?P<text>(?:(?!```).*\n)*)```$", re.MULTILINE)
_INLINE_CONFIGURATION = re.compile(r"`(\{\".*?\})`")
_NAMED_PATH = re.compile(r"`((?:docs|examples|benchmarks|tests|csrc)/[^`\s*]+)`")
_LOG_PREFIX = re.compile(r"^\[[\d ,:-]+\] \[[A-Z]+\] (\[Rank \d+\] )?", re.MULTILINE)
_FIGURE = re.compile(r"-?\d+(\.\d+)?")


@dataclass(frozen=True)
class Block:
    """A fenced block. ``line`` is that of its first line on the page, from 1; ``options`` are the words ``KEY=VALUE``
    after the language."""

    page: str
    line: int
    language: str
    options: dict[str, str]
    text: str

    @property
    def place(self) -> str:
        """Where the block is, to open it there."""
        return f"{self.page}:{self.line}"

    @property
    def runs(self) -> bool:
        """Whether the block is an example to run by itself: no output, no file for others and nothing that is missing."""
        is_program = "file" in self.options and self.language != "json"
        return self.language != "text" and not is_program and "needs" not in self.options


@dataclass(frozen=True)
class Page:
    """One page and its blocks in order."""

    name: str
    text: str
    blocks: tuple[Block, ...]

    @classmethod
    def read(cls, path: Path) -> Page:
        """The page at ``path``."""
        name, text = str(path.relative_to(ROOT)), path.read_text()
        return cls(name, text, tuple(_block(name, text, match) for match in _FENCE.finditer(text)))

    @property
    def inline_configurations(self) -> list[str]:
        """What stands in the text as a configuration."""
        return _INLINE_CONFIGURATION.findall(_FENCE.sub("", self.text))

    @property
    def named_paths(self) -> list[str]:
        """Files and folders of the repository that the text names."""
        return _NAMED_PATH.findall(self.text)

    def running(self, language: str) -> list[Block]:
        """The examples in one language."""
        return [block for block in self.blocks if block.language == language and block.runs]

    def output_of(self, block: Block) -> Block | None:
        """The output that the page shows for ``block``."""
        following = self.blocks[self.blocks.index(block) + 1 :][:1]
        return next((other for other in following if other.language == "text" and "file" not in other.options), None)

    def write_files(self, folder: Path) -> None:
        """Put the page's files into ``folder``."""
        for block in self.blocks:
            if "file" in block.options:
                (folder / block.options["file"]).write_text(block.text)


def _block(page: str, text: str, match: re.Match[str]) -> Block:
    language, *words = match["words"].split() or [""]
    options = dict(word.partition("=")[::2] for word in words)
    return Block(page, text.count("\n", 0, match.start()) + 2, language, options, match["text"])


def pages() -> list[Page]:
    """README and all of ``docs/``."""
    return [Page.read(path) for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md")))]


def check_output(printed: str, shown: Block | None) -> None:
    """Raise AssertionError unless the lines that the page shows are among those that were printed, one after another."""
    if shown is None:
        return
    wanted, found = (_comparable(text, shown.options.get("figures") == "vary") for text in (shown.text, printed))
    assert f"\n{wanted}\n" in f"\n{found}\n", f"{shown.place} shows\n{shown.text}\nand this was printed:\n{printed}"


def _comparable(text: str, figures_vary: bool) -> str:
    lines = _LOG_PREFIX.sub("", text).strip("\n").splitlines()
    if figures_vary:
        lines = [" ".join(_FIGURE.sub("0", line).split()) for line in lines]
    return "\n".join(line.rstrip() for line in lines)
