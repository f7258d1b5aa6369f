from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "train_step.py"
SIZES = {"layers": 1, "width": 32, "heads": 2, "vocabulary": 64, "context": 16, "micro-batch": 1}
TINY = "--layers 1 --width 32 --heads 2 --vocabulary 64 --context 16 --micro-batch 1 --warmup 1 --steps 1".split()  # noqa: SIM905


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], env=environment, capture_output=True, text=True, timeout=100
    )


def test_help_needs_no_engine() -> None:
    result = run("--help")
    assert result.returncode == 0
    assert "--compare" in result.stdout


def test_two_ddp_ranks_hold_sixteen_bytes_per_parameter(tmp_path: Path) -> None:
    report = tmp_path / "figures.json"
    result = run("--engine", "ddp", "--json", str(report), *TINY)
    assert result.returncode == 0, result.stderr
    (figures,) = json.loads(report.read_text())
    assert figures["state_bytes_per_parameter"] == pytest.approx(16, rel=0.02)
    assert figures["wire_volume"] > 1.9
    assert 3.5 < figures["loss"] < 5


def test_a_rank_that_fails_is_shown_with_its_traceback() -> None:
    result = run("--engine", "fsdp2", "--stage", "1", *TINY)
    assert result.returncode != 0
    assert "got 1" in result.stderr
