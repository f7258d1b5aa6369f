from __future__ import annotations

from pathlib import Path

import pytest

from deepspeed.config import DeepSpeedConfig
from deepspeed.config.reference import reference
from deepspeed.config.section import fields
from deepspeed.config.unbuilt import ONLY, SWITCHES, UNBUILT

REFERENCE = reference()
PAGE = Path(__file__).parents[2] / "docs" / "config.md"


def test_the_page_is_up_to_date():
    assert PAGE.read_text() == REFERENCE, "run: deepspeed config reference > docs/config.md"


@pytest.mark.parametrize(("path", "field"), list(fields(DeepSpeedConfig)))
def test_every_key_is_on_the_page_in_its_section(path, field):
    section, _, name = path.rpartition(".")
    _, _, rest = REFERENCE.partition(f"\n## {section or 'Top level'}\n")
    rows = [row for row in rest.partition("\n## ")[0].splitlines() if row.startswith(f"| `{name}` |")]
    assert len(rows) == 1
    assert field.description in rows[0]


@pytest.mark.parametrize("path", [*(path for path, *_ in UNBUILT + ONLY), *(f"{name}.enabled" for name in SWITCHES)])
def test_what_is_not_built_is_on_the_page(path):
    _, _, rest = REFERENCE.partition("\n## What is not built yet\n")
    assert f"- `{path}`" in rest
