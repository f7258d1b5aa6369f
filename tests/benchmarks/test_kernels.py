from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from benchmarks.kernels import Candidate, Case, check_equal

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "kernels.py"


def test_every_case_has_figures_of_memory_and_of_each_candidate(tmp_path: Path) -> None:
    report = tmp_path / "figures.json"
    command = [sys.executable, str(SCRIPT), "--numel", "1000", "--rounds", "2", "--json", str(report)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stderr
    rows = json.loads(report.read_text())
    candidates: dict[str, list[str]] = {}
    for row in rows:
        candidates.setdefault(row["case"], []).append(row["candidate"])
        assert all(row[key] > 0 for key in ("milliseconds", "gigabytes_per_second", "times_memory", "times_ours"))
    assert len(candidates) == 11
    assert all(names[:3] == ["copy", "in place", "deepspeed"] and len(names) > 3 for names in candidates.values())


@pytest.mark.parametrize(("value", "equal"), [(1.0, True), (1.1, False), (float("nan"), False)])
def test_a_candidate_that_does_other_work_is_an_error(value: float, equal: bool) -> None:
    results = {"deepspeed": torch.ones(3), "other": torch.tensor([1.0, 1.0, value])}
    candidates = {name: Candidate(lambda: None, lambda result=result: result) for name, result in results.items()}
    case = Case("AdamW fp32", 12, candidates, tolerance=1e-2)
    if equal:
        check_equal(case)
    else:
        with pytest.raises(AssertionError, match="AdamW fp32: other and deepspeed differ"):
            check_equal(case)
