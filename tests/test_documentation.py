from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

README = (Path(__file__).parent.parent / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_script_of_the_readme_trains_on_two_ranks_with_its_configuration(tmp_path: Path) -> None:
    (script,), (configuration,) = blocks("python"), blocks("json")
    (tmp_path / "train.py").write_text(script)
    (tmp_path / "ds_config.json").write_text(configuration)
    command = [sys.executable, "-m", "deepspeed", "--num_gpus", "2", "train.py"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert run.returncode == 0, run.stdout + run.stderr
    assert (tmp_path / "checkpoints" / "latest").read_text().strip() == "global_step32"


def test_every_page_and_program_that_the_readme_names_is_there() -> None:
    root = Path(__file__).parent.parent
    named = re.findall(r"`((?:docs|examples|benchmarks)/[^`\s]+)`", README)
    assert named
    assert [path for path in named if not (root / path).exists()] == []
