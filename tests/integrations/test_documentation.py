"""The programs of docs/integrations.md run as they stand, one after the other."""

from __future__ import annotations

import os
import re
from pathlib import Path

from .common import unconfigured

PAGE = (Path(__file__).parent.parent.parent / "docs/integrations.md").read_text()
PROGRAMS = re.findall(r"```python.*?\n(.*?)```", PAGE, re.DOTALL)


def run(folder: str, program: str) -> None:
    before = Path.cwd()
    os.chdir(folder)
    try:
        with unconfigured():
            exec(program, {"__name__": "__main__"})
    finally:
        os.chdir(before)


def test_the_programs_of_the_page_run_on_two_ranks(ranks, tmp_path):
    assert len(PROGRAMS) == 3
    for program in PROGRAMS:
        ranks(2, run, str(tmp_path), program)
    assert (tmp_path / "runs/gpt2/final/model.safetensors").exists()
    assert (tmp_path / "runs/accelerate/state/latest").exists()
