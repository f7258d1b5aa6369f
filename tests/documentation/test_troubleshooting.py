"""What docs/troubleshooting.md quotes is said by the package in these words."""

from __future__ import annotations

import ast
import re
from functools import cache

import pytest

from tests.documentation.pages import ROOT

_QUOTATION = re.compile(r"(?:^> .*\n)+", re.MULTILINE)
_VARYING = "\0"
_PLACEHOLDER = re.compile(r"%[sdg]")


def quotations() -> list[str]:
    """The messages that the page quotes, each on one line."""
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    return [" ".join(line[2:] for line in found.splitlines()) for found in _QUOTATION.findall(text)]


@cache
def messages() -> tuple[str, ...]:
    """Every string of the package's source, with a mark where a value comes in."""
    trees = [ast.parse(path.read_text()) for path in (ROOT / "src").glob("**/*.py")]
    return tuple(text for tree in trees for node in ast.walk(tree) if (text := _text_of(node)))


def _text_of(node: ast.AST) -> str:
    if isinstance(node, ast.JoinedStr):
        parts = (_text_of(part) or _VARYING for part in node.values)
        return "".join(parts)
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return _PLACEHOLDER.sub(_VARYING, node.value)
    return ""


def pattern_of(quotation: str) -> re.Pattern[str]:
    """Matches a message that has what the page quotes: values come in at the dots and nowhere else."""
    return re.compile(f"[^{_VARYING}]*{_VARYING}.*".join(map(re.escape, quotation.strip(". ").split("..."))), re.DOTALL)


@pytest.mark.parametrize("quotation", quotations())
def test_a_quoted_message_is_in_the_source(quotation: str) -> None:
    wanted = pattern_of(quotation)
    assert any(wanted.search(message) for message in messages()), f"nothing in src/ says: {quotation}"


def test_each_message_is_quoted_once_and_a_changed_one_is_noticed() -> None:
    found = quotations()
    assert len(found) == len(set(found)) > 30
    wanted = pattern_of("step ... skipped: non-finite gradient... (rank ..., loss scale ...)")
    assert any(wanted.search(message) for message in messages())
    changed = pattern_of("step ... skipped: infinite gradient... (rank ..., loss scale ...)")
    assert not any(changed.search(message) for message in messages())
