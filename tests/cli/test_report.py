from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

import deepspeed
from deepspeed import native
from deepspeed.cli import report

SOURCE = Path(deepspeed.__file__).parent.parent


def test_the_report_shows_versions_kernels_machine_and_tools():
    command = [sys.executable, "-m", "deepspeed.cli.report"]
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    shown = " ".join(result.stdout.split())
    for expected in (deepspeed.__version__, torch.__version__, native.status(), "gloo", "/dev/shm", "ulimit -l"):
        assert " ".join(expected.split()) in shown


def test_what_is_not_there_is_said_and_not_an_error(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(report, "OPTIONAL_LIBRARIES", ("no_such_library",))
    found = report.sections()
    assert ("pdsh", "not on PATH") in found["communication"]
    assert found["optional"] == [("no_such_library", "not installed")]
