from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def run_example(tmp_path: Path, steps: int) -> str:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 400)
    example = ROOT / "examples/train_lm"
    size = ["--layers", "1", "--width", "16", "--heads", "2", "--context", "16", "--vocabulary", "300"]
    command = [sys.executable, "-m", "deepspeed", "--num_gpus", "2", str(example / "train.py"), *size]
    command += ["--deepspeed_config", str(example / "ds_config.json"), "--data", str(text)]
    command += ["--output", str(tmp_path / "run"), "--steps", str(steps)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "DS_ACCELERATOR": "cpu"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_the_example_trains_saves_and_goes_on(tmp_path):
    assert "starting anew" in run_example(tmp_path, 3)
    assert (tmp_path / "run/checkpoints/latest").read_text() == "global_step3"
    assert "going on from" in run_example(tmp_path, 5)
    assert (tmp_path / "run/checkpoints/latest").read_text() == "global_step5"
