from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from deepspeed.native.file_engine import backends

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "files.py"


def test_every_backend_has_figures_beside_plain_streams(tmp_path: Path) -> None:
    report = tmp_path / "figures.json"
    command = [sys.executable, str(SCRIPT), str(tmp_path), "--size", "1", "--rounds", "2", "--json", str(report)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stderr
    rows = json.loads(report.read_text())
    available = [name for name, text in backends().items() if not text.startswith("not ")]
    expected = ["stream, 1 MiB", "stream, 16 MiB", *(name + how for name in available for how in ("", ", unaligned"))]
    for direction in ("read", "write"):
        found = [row for row in rows if row["direction"] == direction]
        assert [row["candidate"] for row in found if "registered" not in row["candidate"]] == expected
        assert found[0]["times_stream"] == 1.0
        assert all(row["gigabytes_per_second"] > 0 for row in found)
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]
