from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "checkpoints.py"


def test_a_small_model_is_saved_loaded_at_two_sizes_and_exported(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), str(tmp_path), "--compare", "ours=python:deepspeed:2:async"]
    command += ["--layers", "1", "--vocabulary", "64", "--ranks", "1", "--others", "1"]
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=110)
    assert result.returncode == 0, result.stderr
    name, megabytes, *figures = result.stdout.splitlines()[-1].split()
    assert name == "ours" and float(megabytes) > 50 and len(figures) == 10 and "refused" not in figures, result.stderr
    assert list(tmp_path.iterdir()) == [tmp_path / "result.json"]
