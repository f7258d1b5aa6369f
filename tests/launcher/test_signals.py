from __future__ import annotations

import signal

from tests.launcher.conftest import WAIT, ended, processes, saved, wait_until


def test_an_interrupt_lets_every_rank_save_before_the_launcher_returns_130(tmp_path, start):
    launcher = start(["--num_gpus", "2"], WAIT)
    ranks = processes(tmp_path, 2)
    launcher.send_signal(signal.SIGINT)
    _, errors = launcher.communicate(timeout=60)
    assert launcher.returncode == 130, errors
    assert saved(tmp_path) == ["0", "1"]
    assert all(ended(rank) for rank in ranks)


def test_a_second_interrupt_ends_ranks_that_still_save(tmp_path, start):
    launcher = start(["--num_gpus", "2"], WAIT.replace("0.5", "50"))
    ranks = processes(tmp_path, 2)
    launcher.send_signal(signal.SIGINT)
    assert "ranks have 30 s to save" in launcher.stderr.readline() + launcher.stderr.readline()
    launcher.send_signal(signal.SIGINT)
    _, errors = launcher.communicate(timeout=60)
    assert launcher.returncode == 130 and "killing ranks that still run: 0, 1" in errors
    assert saved(tmp_path) == [] and all(ended(rank) for rank in ranks)


def test_ranks_save_even_where_nobody_reads_the_launchers_messages_any_more(tmp_path, start):
    launcher = start(["--num_gpus", "2"], WAIT)
    processes(tmp_path, 2)
    launcher.stderr.close()
    launcher.send_signal(signal.SIGINT)
    assert launcher.wait(timeout=60) == 130
    assert saved(tmp_path) == ["0", "1"]


def test_no_rank_outlives_a_launcher_that_was_killed(tmp_path, start):
    launcher = start(["--num_gpus", "2"], WAIT)
    ranks = processes(tmp_path, 2)
    launcher.kill()
    launcher.communicate(timeout=60)
    wait_until(lambda: all(ended(rank) for rank in ranks))
