"""Launchers that run for real, and the scripts that tests give them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent.parent / "src"

Start = Callable[..., "subprocess.Popen[str]"]

TRAIN = """
import os
import torch, torch.distributed as dist
torch.set_num_threads(1)
dist.init_process_group("gloo")
weight = torch.zeros(4)
for step in range(3):
    gradient = torch.full((4,), float(dist.get_rank() + 1))
    dist.all_reduce(gradient)
    weight -= gradient
rank = dist.get_rank()
line = f"{dist.get_world_size()} {os.environ['LOCAL_RANK']} {os.environ['LOCAL_SIZE']} {weight[0].item()} {os.environ['NOTE']}"
open(f"{rank}.done", "w").write(line)
dist.destroy_process_group()
"""
"""Four ranks on two nodes, with NOTE set: each leaves the line that `trained` gives."""

# Ranks that wait to be ended; the last of four fails when it is told to.
WAIT = """
import os, time
rank = os.environ["RANK"]
open(rank + ".pid", "w").write(str(os.getpid()))
try:
    for _ in range(600):
        time.sleep(0.1)
        if rank == "3" and os.path.exists("fail"):
            raise ValueError("no such luck")
except KeyboardInterrupt:
    time.sleep(0.5)
    open(rank + ".saved", "w").write("saved")
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """``start(options, script)``: the running ``deepspeed`` command, in ``tmp_path`` and with its ``bin`` before all
    other programs; ended with the test."""
    running = []

    def run(options: list[str], script: str = "") -> subprocess.Popen[str]:
        path = tmp_path / "script.py"
        path.write_text(script)
        environment = {**os.environ, "PYTHONPATH": str(SOURCE), "DS_ACCELERATOR": "cpu"}
        environment["PATH"] = f"{tmp_path / 'bin'}{os.pathsep}{environment['PATH']}"
        command = [sys.executable, "-m", "deepspeed", *options, "--no_local_rank", str(path)]
        process = subprocess.Popen(command, env=environment, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
        running.append(process)
        return process

    yield run
    for process in running:
        process.kill()
        process.wait()
        process.stderr.close()


@pytest.fixture
def port() -> int:
    """A port that is free and whose next is, for the word between nodes."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port = first.getsockname()[1]
            try:
                second.bind(("127.0.0.1", port + 1))
            except (OSError, OverflowError):
                continue
            return int(port)


def write_program(path: Path, text: str) -> None:
    """A program for the shell at ``path``."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def processes(folder: Path, count: int) -> list[int]:
    """The ids of the ranks that run `WAIT` in ``folder``, once all do."""
    files = [folder / f"{rank}.pid" for rank in range(count)]
    wait_until(lambda: all(file.exists() and file.read_text() for file in files))
    return [int(file.read_text()) for file in files]


def saved(folder: Path) -> list[str]:
    """The ranks that have saved in ``folder``."""
    return sorted(path.stem for path in folder.glob("*.saved"))


def trained(note: str) -> list[str]:
    """What `TRAIN` leaves, by rank."""
    return [f"4 {rank % 2} 2 -30.0 {note}" for rank in range(4)]


def wait_until(condition: Callable[[], bool]) -> None:
    """Return when ``condition()`` holds; AssertionError after a minute."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "waited a minute"
        time.sleep(0.05)


def ended(process: int) -> bool:
    """Whether the process has ended, waited for or not."""
    try:
        return "\nState:\tZ" in Path(f"/proc/{process}/status").read_text()
    except OSError:
        return True
