from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str, page: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)


def run(command: list[str], directory: Path) -> None:
    done = subprocess.run([sys.executable, *command], cwd=directory, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_script_of_the_readme_trains_on_two_ranks_with_its_configuration(tmp_path: Path) -> None:
    (script,), (configuration,) = blocks("python"), blocks("json")
    (tmp_path / "train.py").write_text(script)
    (tmp_path / "ds_config.json").write_text(configuration)
    run(["-m", "deepspeed", "--num_gpus", "2", "train.py"], tmp_path)
    assert (tmp_path / "checkpoints" / "latest").read_text().strip() == "global_step32"


def test_every_page_and_program_that_the_readme_names_is_there() -> None:
    named = re.findall(r"`((?:docs|examples|benchmarks)/[^`\s]+)`", README)
    assert named
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_the_scripts_of_the_page_on_activation_checkpointing_run(tmp_path: Path) -> None:
    *one_process, split = blocks("python", (ROOT / "docs/activation-checkpointing.md").read_text())
    (tmp_path / "one.py").write_text("\n".join(one_process))
    (tmp_path / "split.py").write_text(split)
    run(["one.py"], tmp_path)
    run(["-m", "deepspeed", "--num_gpus", "2", "split.py"], tmp_path)
