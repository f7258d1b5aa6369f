"""Jobs on two "nodes" that are both this machine: started by hand, or by an ``ssh`` that runs its command here."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tests.launcher.conftest import TRAIN, WAIT, ended, processes, saved, trained, wait_until, write_program


@pytest.fixture(params=["by hand", "ssh"])
def job(request, tmp_path, start, port):
    """``job(script)``: the launchers of a job of two nodes with two ranks each."""
    (tmp_path / ".deepspeed_env").write_text("NOTE=a'b%c\n")
    (tmp_path / "hosts").write_text("localhost slots=2\n127.0.0.1 slots=2\n")
    write_program(tmp_path / "bin/ssh", '#!/bin/sh\nwhile [ "$1" = -o ]; do shift 2; done\ncd / && exec sh -c "$2"\n')
    options = ["--hostfile", "hosts", "--master_port", str(port)]

    def run(script):
        if request.param == "ssh":
            return [start(options, script)]
        return [start([*options, "--no_ssh", "--node_rank", str(node)], script) for node in range(2)]

    return run


def running(tmp_path: Path, launchers: list[subprocess.Popen[str]], port: int) -> list[int]:
    """The ids of the four ranks, once they run and the launchers are in touch."""
    ranks = processes(tmp_path, 4)
    if len(launchers) == 2:
        wait_until(lambda: stays_connected(launchers[1].pid, port + 1))
    return ranks


def stays_connected(process: int, port: int) -> bool:
    """Whether a process keeps a connection to a port; one that only tries whether the port answers does not."""

    def ends() -> set[int]:
        found = psutil.Process(process).net_connections("tcp")
        return {connection.laddr.port for connection in found if connection.raddr and connection.raddr.port == port}

    before = ends()
    time.sleep(1.0)
    return bool(before & ends())


def test_four_ranks_on_two_nodes_train_together(tmp_path, job):
    launchers = job(TRAIN)
    errors = [launcher.communicate(timeout=100)[1] for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [0] * len(launchers), errors
    lines = [(tmp_path / f"{rank}.done").read_text() for rank in range(4)]
    assert lines == trained("a'b%c")


def test_a_failing_rank_takes_the_other_node_down(tmp_path, job, port):
    launchers = job(WAIT)
    ranks = running(tmp_path, launchers, port)
    (tmp_path / "fail").touch()
    errors = [launcher.communicate(timeout=30)[1] for launcher in launchers]
    assert all(launcher.returncode == 1 for launcher in launchers)
    assert "rank 3 failed on 127.0.0.1" in errors[-1] and "ValueError: no such luck" in errors[-1]
    assert all(ended(rank) for rank in ranks)


def test_an_interrupt_lets_the_ranks_of_both_nodes_save(tmp_path, job, port):
    launchers = job(WAIT)
    ranks = running(tmp_path, launchers, port)
    launchers[0].send_signal(signal.SIGINT)
    errors = [launcher.communicate(timeout=30)[1] for launcher in launchers]
    assert all(launcher.returncode == 130 for launcher in launchers), errors
    assert saved(tmp_path) == ["0", "1", "2", "3"]
    assert all(ended(rank) for rank in ranks)


def test_no_rank_outlives_the_first_nodes_launcher(tmp_path, job, port):
    launchers = job(WAIT)
    ranks = running(tmp_path, launchers, port)
    launchers[0].kill()
    wait_until(lambda: all(ended(rank) for rank in ranks))
    assert saved(tmp_path) == []


def run(start, options, script="") -> subprocess.CompletedProcess[str]:
    process = start(options, script)
    _, errors = process.communicate(timeout=60)
    return subprocess.CompletedProcess(process.args, process.returncode, "", errors)


def test_a_host_that_ssh_cannot_reach_is_named_before_anything_starts(tmp_path, start):
    (tmp_path / "hosts").write_text("localhost slots=1\nnowhere slots=1\n")
    write_program(tmp_path / "bin/ssh", '#!/bin/sh\ncase "$*" in *nowhere*) echo "no route" >&2; exit 255;; esac\n')
    result = run(start, ["--hostfile", "hosts", "--master_addr", "localhost"])
    assert result.returncode == 2 and "nowhere: no route" in result.stderr
    result = run(start, ["--hostfile", "hosts", "--master_addr", "localhost", "--no_ssh_check"])
    assert result.returncode == 255 and "ssh could not reach nowhere" in result.stderr


def test_a_tool_that_is_not_installed_is_an_error_but_its_commands_can_be_seen(tmp_path, start, monkeypatch):
    monkeypatch.setenv("PATH", "")
    (tmp_path / "hosts").write_text("a slots=1\nb slots=1\n")
    options = ["--hostfile", "hosts", "--launcher", "pdsh"]
    result = run(start, options)
    assert result.returncode == 2 and "--launcher pdsh needs pdsh, which is not on this machine's PATH" in result.stderr
    assert run(start, [*options, "--dry_run"]).returncode == 0


def test_a_dry_run_prints_each_nodes_command_and_starts_nothing(tmp_path, start, capfd):
    (tmp_path / "hosts").write_text("a slots=1\nb slots=2\n")
    assert run(start, ["--hostfile", "hosts", "--dry_run", "--env", "K=V W"], "open('ran', 'w')").returncode == 0
    lines = capfd.readouterr().out.splitlines()
    assert len(lines) == 2 and all(line.startswith("ssh -o BatchMode=yes ") and "K=V W" in line for line in lines)
    assert not (tmp_path / "ran").exists()
