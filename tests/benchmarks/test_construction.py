from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "construction.py"
TINY = ["--rounds", "1", "--layers", "2", "--width", "64", "--heads", "2", "--vocabulary", "128"]
PARAMETERS = 2 * 128 * 64 + 2 * (12 * 64**2 + 13 * 64) + 2 * 64


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], env=environment, capture_output=True, text=True, timeout=100
    )


@pytest.mark.parametrize("initialize", ["once", "twice"])
def test_candidates_construct_the_same_model_on_two_ranks(initialize: str, tmp_path: Path) -> None:
    report = tmp_path / "figures.json"
    result = run("--candidates", "fsdp2", "deepspeed", "--initialize", initialize, "--json", str(report), *TINY)
    assert result.returncode == 0, result.stderr
    rows = json.loads(report.read_text())
    assert [(row["name"], row["parameters"]) for row in rows] == [("fsdp2", PARAMETERS), ("deepspeed", PARAMETERS)]
    assert all(row["seconds"] > 0 and row["start_bytes"] > 0 for row in rows)
    assert "peak / model" in result.stdout


def test_a_candidate_that_fails_is_shown_with_its_traceback() -> None:
    result = run("--candidates", "deepspeed", *TINY[:-1], "-1")
    assert result.returncode != 0
    assert "RuntimeError" in result.stderr
    assert "deepspeed: rank" in result.stderr
