from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples/infinity/train.py"


def run(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLE.parents[2] / "src"), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "deepspeed", "--num_gpus", "2", str(EXAMPLE), "--folder", str(folder), *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)


def test_a_model_on_the_disk_learns_and_leaves_nothing_there(tmp_path):
    result = run(tmp_path, "--parameters", "2e5", "--context", "32", "--steps", "4", "--lr", "2e-3")
    assert result.returncode == 0, result.stderr
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", result.stdout)]
    assert len(losses) == 4 and losses[-1] < losses[0] - 0.3
    assert not list(tmp_path.iterdir())


def test_what_the_disk_cannot_hold_is_refused_with_the_arithmetic(tmp_path):
    result = run(tmp_path, "--parameters", "1e15")
    said = result.stdout + result.stderr
    assert result.returncode != 0 and "need 16 bytes each" in said and "give at most --parameters" in said
