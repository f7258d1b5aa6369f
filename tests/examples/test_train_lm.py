from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

EXAMPLE = Path(__file__).parent.parent.parent / "examples/train_lm"
SIZE = ["--layers", "1", "--width", "16", "--heads", "2", "--context", "16", "--vocabulary", "300", "--evaluate_every", "50"]
STEPS = 200


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("train_lm")
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 400)
    return folder


def start(folder: Path, run: str, *options: str, ranks: int = 2) -> subprocess.Popen[str]:
    """The example, started by the launcher, or as a plain script where it has one rank."""
    launcher = ["-m", "deepspeed", "--num_gpus", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *launcher, str(EXAMPLE / "train.py"), *SIZE, "--text", str(folder / "text.txt")]
    command += ["--output", str(folder / run), "--precision", "fp32", *options]
    source = str(EXAMPLE.parent.parent / "src")
    environment = {**os.environ, "PYTHONPATH": source, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=environment, text=True, **streams)


def finish(process: subprocess.Popen[str], code: int = 0) -> tuple[str, str]:
    """What the process writes until it ends, which it does with ``code``."""
    output, errors = process.communicate(timeout=100)
    assert process.returncode == code, output + errors
    return output, errors


@pytest.fixture(scope="module")
def whole(folder) -> str:
    """What a run that nothing interrupts prints."""
    return finish(start(folder, "whole", "--steps", str(STEPS)))[0]


def latest(folder: Path, run: str) -> Path:
    checkpoints = folder / run / "checkpoints"
    return checkpoints / (checkpoints / "latest").read_text()


def test_it_learns_and_says_what_it_did(folder, whole):
    losses = [float(line.split()[-1]) for line in whole.splitlines() if ": validation loss" in line]
    assert len(losses) == 1 + STEPS / 50
    assert losses[-1] < 0.5 * losses[0]
    assert "ZeRO stage 2" in whole and "tokens/s" in whole and "MB/rank" in whole and "a sample" in whole
    assert latest(folder, "whole").name == f"global_step{STEPS}"
    assert (folder / "whole/report.png").read_bytes().startswith(b"\x89PNG")


def test_model_states_are_measured_beside_computed_under_every_stage(whole):
    rows = [line.replace("MB", "").split("│")[1:4] for line in whole.splitlines() if line.startswith("│")]
    assert [row[0].strip() for row in rows] == ["0", "1", "2"]
    for _, measured, computed in rows:
        assert float(measured) == pytest.approx(float(computed), rel=0.1, abs=0.011)  # printed with one decimal


def test_a_run_stopped_by_ctrl_c_saves_and_the_next_ends_as_if_nothing_had_happened(folder, whole):
    stopped = start(folder, "stopped", "--steps", str(STEPS))
    assert stopped.stdout is not None
    while "step 50:" not in (line := stopped.stdout.readline()):
        assert line, stopped.communicate()
    stopped.send_signal(signal.SIGINT)
    output, _ = finish(stopped, code=128 + signal.SIGINT)
    step = int(latest(folder, "stopped").name.removeprefix("global_step"))
    assert 50 <= step < STEPS
    assert f"saved step {step}" in output and "a sample" not in output

    resumed, _ = finish(start(folder, "stopped", "--steps", str(STEPS)))
    assert f"going on from step {step}, to step {STEPS}" in resumed
    for rank in range(2):
        name = f"rank_{rank:05d}.safetensors"
        mine, theirs = (load_file(latest(folder, run) / name) for run in ("stopped", "whole"))
        assert mine.keys() == theirs.keys()
        states = [key for key in mine if not key.startswith("rank/")]  # the example seeds torch's random numbers alone
        assert [key for key in states if not mine[key].equal(theirs[key])] == []


def test_a_run_that_has_ended_trains_on_under_another_stage_and_precision(folder, whole):
    output, _ = finish(start(folder, "whole", "--steps", "100", "--stage", "1", "--precision", "bf16"))
    assert f"going on from step {STEPS}, to step {STEPS + 100}" in output
    assert "bfloat16" in output and "ZeRO stage 1" in output
    assert latest(folder, "whole").name == f"global_step{STEPS + 100}"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--text", "nowhere.txt"], "--text nowhere.txt: there is no such file or folder"),
        (["--stage", "7"], "argument --stage: invalid choice"),
        (["--layers", "2"], "blocks.1.attention_norm.weight is missing there"),
    ],
    ids=["missing text", "unknown stage", "checkpoint of another size"],
)
def test_a_mistake_is_one_clear_sentence(folder, whole, options, sentence):
    _, errors = finish(start(folder, "whole", *options, ranks=1), code=1)
    assert sentence in errors
    assert "Traceback" not in errors


def test_a_text_too_short_for_one_window_is_refused(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLE))
    from data import load_corpus

    (tmp_path / "text.txt").write_text("a few words")
    with pytest.raises(SystemExit, match=r"too short: \d+ tokens for training, where one window takes 129"):
        load_corpus(str(tmp_path / "text.txt"), vocabulary=300, context=128, cache=tmp_path)
