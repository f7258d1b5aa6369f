from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples/infinity/train.py"
sys.path.append(str(EXAMPLE.parent))
from room import Room, shape_of  # noqa: E402


def start(folder: Path, *options: str, ranks: int = 2) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLE.parents[2] / "src"), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "deepspeed", "--num_gpus", str(ranks), str(EXAMPLE), "--folder", str(folder), *options]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=environment, text=True, **streams)


def run(folder: Path, *options: str, ranks: int = 2) -> subprocess.CompletedProcess[str]:
    process = start(folder, *options, ranks=ranks)
    output, errors = process.communicate(timeout=100)
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def test_a_model_on_the_disk_learns_and_leaves_nothing_there(tmp_path):
    result = run(tmp_path, "--parameters", "2e5", "--context", "32", "--steps", "4", "--lr", "2e-3")
    assert result.returncode == 0, result.stderr
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", result.stdout)]
    assert len(losses) == 4 and losses[-1] < losses[0] - 0.3
    assert not list(tmp_path.iterdir())


def test_ctrl_c_saves_and_the_same_command_goes_on_with_the_same_model(tmp_path):
    options = ["--parameters", "1e5", "--context", "32"]
    process = start(tmp_path, *options, "--steps", "100000", ranks=1)
    for line in process.stdout:
        if line.startswith("step 2:"):
            process.send_signal(signal.SIGINT)
            break
    rest, errors = process.communicate(timeout=100)
    assert process.returncode == 130, rest + errors
    step = int(re.search(r"saved step (\d+)", rest)[1])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", "shape.json"]
    again = run(tmp_path, "--context", "32", "--steps", str(step + 2), ranks=1)
    assert again.returncode == 0, again.stderr
    assert f"going on from step {step}" in again.stdout
    assert [int(number) for number in re.findall(r"^step (\d+): loss", again.stdout, re.MULTILINE)] == [step + 1, step + 2]


@pytest.mark.parametrize(("disk", "memory", "limit"), [(17e9, 100e9, "disk"), (1e12, 1.5e9, "memory")])
def test_the_largest_model_that_fits_is_found_and_a_larger_one_refused(disk, memory, limit):
    room = Room(disk=int(disk), memory=int(memory), base=400_000_000, buffers=500_000_000)
    largest = room.largest(1e13, 300, 256)
    assert room.refusal(largest, 256) is None
    refusal = room.refusal(shape_of(1.2 * largest.parameters, 300), 256)
    assert f"of {limit}" in refusal or f"the {limit} has" in refusal
    if limit == "disk":
        assert 0.9e9 < largest.parameters <= 1e9 and not room.has_checkpoint(largest)


def test_what_the_disk_cannot_hold_is_refused_with_the_arithmetic(tmp_path):
    result = run(tmp_path, "--parameters", "1e15")
    said = result.stdout + result.stderr
    assert result.returncode != 0 and "need 16 bytes each" in said and "give at most --parameters" in said
