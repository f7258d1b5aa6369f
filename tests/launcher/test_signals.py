from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

SOURCE = Path(__file__).parent.parent.parent / "src"

SAVES_ON_INTERRUPT = """
import os, time
open(os.environ["RANK"] + ".pid", "w").write(str(os.getpid()))
try:
    time.sleep(50)
except KeyboardInterrupt:
    time.sleep(0.5)
    open(os.environ["RANK"] + ".saved", "w").write("saved")
"""


def start(tmp_path: Path, script: str) -> tuple[subprocess.Popen[str], list[int]]:
    """The launcher with two ranks, and their process ids once both run."""
    path = tmp_path / "script.py"
    path.write_text(script)
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-m", "deepspeed", "--num_gpus", "2", str(path)]
    launcher = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    files = [tmp_path / f"{rank}.pid" for rank in range(2)]
    wait_until(lambda: all(file.exists() and file.read_text() for file in files))
    return launcher, [int(file.read_text()) for file in files]


def wait_until(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "waited a minute for the ranks"
        time.sleep(0.05)


def ended(process: int) -> bool:
    try:
        return "\nState:\tZ" in Path(f"/proc/{process}/status").read_text()
    except OSError:
        return True


def test_an_interrupt_lets_every_rank_save_before_the_launcher_returns_130(tmp_path):
    launcher, processes = start(tmp_path, SAVES_ON_INTERRUPT)
    launcher.send_signal(signal.SIGINT)
    _, errors = launcher.communicate(timeout=60)
    assert launcher.returncode == 130, errors
    assert all((tmp_path / f"{rank}.saved").exists() for rank in range(2))
    assert all(ended(process) for process in processes)


def test_no_rank_outlives_a_launcher_that_was_killed(tmp_path):
    launcher, processes = start(tmp_path, SAVES_ON_INTERRUPT)
    launcher.kill()
    launcher.communicate(timeout=60)
    wait_until(lambda: all(ended(process) for process in processes))
