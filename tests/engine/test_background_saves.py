"""Saves beside training: what they hold, what comes of their errors, who waits for them."""

from __future__ import annotations

import resource
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from torch import Tensor

from deepspeed.checkpoint.directory import CheckpointError, find_checkpoint, read_latest
from tests.engine.test_checkpointing import TRAINING, Model, squared_output, train
from tests.parity import Training, assert_equal, make_engine, state_of

ASYNC = Training(Model, squared_output, config={**TRAINING.config, "checkpoint": {"async_save": True, "keep_last": 2}})


def saved_while_training(directory: str, stage: int) -> tuple[list[dict[str, Tensor]], list[str]]:
    engine = make_engine(ASYNC, stage)
    states = []
    for step in range(4):
        train(engine, step, step + 1)
        states.append(state_of(engine.module))
        engine.save_checkpoint(directory, client_state={"step": step})
    train(engine, 4, 6)
    _, client_state = engine.load_checkpoint(directory)
    assert client_state == {"step": 3} and engine.global_steps == 4
    states.append(state_of(engine.module))
    engine.load_checkpoint(directory, tag="global_step3")
    states.append(state_of(engine.module))
    return states, sorted(path.name for path in Path(directory).iterdir())


@pytest.mark.parametrize("stage", [1, 3])
def test_a_save_holds_the_state_when_it_was_asked_for_whatever_training_does_meanwhile(ranks, tmp_path, stage):
    for states, names in ranks(2, saved_while_training, str(tmp_path), stage):
        assert_equal(states[4], states[3])
        assert_equal(states[5], states[2])
        assert names == ["global_step3", "global_step4", "latest", "zero_to_fp32.py"]


def failing_in_the_background(directory: str) -> tuple[str, str]:
    """Rank 1's disk is full during the second save."""
    engine = make_engine(ASYNC, 1)
    train(engine, 0, 1)
    engine.save_checkpoint(directory, tag="first")
    engine._saves.wait()
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        if engine.communicator.rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        engine.save_checkpoint(directory, tag="second")
        for thread in [thread for thread in threading.enumerate() if thread.name.startswith("saving")]:
            thread.join()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    with pytest.raises(CheckpointError) as caught:
        engine.save_checkpoint(directory, tag="third")
    latest = str(read_latest(Path(directory)))
    engine.save_checkpoint(directory, tag="fourth")
    engine.destroy()
    return str(caught.value), latest


def test_an_error_in_the_background_is_raised_by_the_next_save_on_all_ranks_and_then_saves_go_on(ranks, tmp_path):
    for message, latest in ranks(2, failing_in_the_background, str(tmp_path)):
        assert "second" in message and "rank 1" in message
        assert latest == "first"
    assert find_checkpoint(tmp_path, "fourth") and read_latest(tmp_path) == "fourth"
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["first", "fourth"]


EXITING = """
import sys, time
from pathlib import Path
from deepspeed.checkpoint.background import BackgroundSaves
def work():
    time.sleep(0.5)
    Path(sys.argv[1]).write_text("whole")
BackgroundSaves().start(work, "saving")
"""


def test_a_process_that_ends_waits_for_its_save(tmp_path):
    subprocess.run([sys.executable, "-c", EXITING, str(tmp_path / "saved")], check=True, timeout=60)
    assert (tmp_path / "saved").read_text() == "whole"


def failing_at_the_end(directory: str) -> str:
    engine = make_engine(ASYNC, 1)
    engine._saves.start(lambda: (_ for _ in ()).throw(OSError("no room")), "saving the last")
    with pytest.raises(CheckpointError) as caught:
        engine.destroy()
    return str(caught.value)


def test_an_error_of_the_last_save_is_raised_when_the_engine_is_destroyed(ranks, tmp_path):
    assert ranks(1, failing_at_the_end, str(tmp_path)) == ["saving the last failed: no room"]
