from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "plan.py"


def test_the_planned_peak_is_near_the_measured_one(tmp_path: Path) -> None:
    report = tmp_path / "rows.json"
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    options = ["--model", "20M", "--context", "64", "--folder", str(tmp_path), "--json", str(report)]
    command = [sys.executable, str(SCRIPT), *options, "--ways", "3:parameters, optimizer"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=110)
    assert result.returncode == 0, result.stderr
    rows = json.loads(report.read_text())
    (row,) = rows
    assert row["way"] == "3:parameters, optimizer"
    assert 0.8 < row["planned"] / row["measured"] < 1.2, row
