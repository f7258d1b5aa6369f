from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launcher.conftest import SOURCE, WAIT, processes


def launch(tmp_path: Path, script: str, *options: str) -> subprocess.CompletedProcess[str]:
    path = tmp_path / "script.py"
    path.write_text(script)
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "DS_ACCELERATOR": "cpu"}
    environment.pop("OMP_NUM_THREADS", None)
    command = [sys.executable, "-m", "deepspeed", *options, str(path), "--flag"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, cwd=tmp_path)


def test_each_rank_knows_its_place_and_its_share_of_threads(tmp_path):
    script = (
        "import os, sys\nnames = ['RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'MASTER_ADDR']\n"
        "open(os.environ['RANK'], 'w').write(' '.join([os.environ[n] for n in names] + sys.argv[1:]))\n"
        "assert int(os.environ['OMP_NUM_THREADS']) >= 1 and int(os.environ['MASTER_PORT'])\n"
    )
    result = launch(tmp_path, script, "--num_gpus", "2")
    assert result.returncode == 0, result.stderr
    for rank in range(2):
        assert (tmp_path / str(rank)).read_text() == f"{rank} {rank} 2 127.0.0.1 --local_rank={rank} --flag"


@pytest.mark.parametrize(
    ("failure", "code", "message"),
    [
        ("raise ValueError('no such luck')", 1, "ValueError: no such luck"),
        ("sys.exit(3)", 3, "exit code 3"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", 139, "killed by SIGSEGV"),
    ],
)
def test_a_rank_that_fails_takes_the_others_down_and_says_why(tmp_path, failure, code, message):
    script = f"import os, signal, sys, time\nif os.environ['RANK'] == '1':\n    {failure}\ntime.sleep(50)\n"
    result = launch(tmp_path, script, "--num_gpus", "2")
    assert result.returncode == code
    assert "rank 1" in result.stderr and message in result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--num_gpus", "0"], "0 is too few; expected 1 or more"), (["--num_nodes", "2"], "needs a hostfile")],
)
def test_a_wrong_command_line_is_refused(tmp_path, options, message):
    result = launch(tmp_path, "", *options)
    assert result.returncode == 2
    assert message in result.stderr


def test_a_module_or_program_runs_on_pinned_cores_with_its_own_log(tmp_path):
    (tmp_path / "job.py").write_text("import os, sys\nprint(sorted(os.sched_getaffinity(0)), sys.argv[1:])\n")
    core = min(os.sched_getaffinity(0))
    environment = {**os.environ, "PYTHONPATH": f"{SOURCE}{os.pathsep}{tmp_path}", "DS_ACCELERATOR": "cpu"}
    bind = ["--bind_core_list", str(core), "--enable_each_rank_log", "logs"]
    for what, arguments in (
        (["--module", "job"], ["--local_rank=0"]),
        (["--module", "--no_local_rank", "job"], []),
        (["--no_python", sys.executable, "job.py"], []),
    ):
        command = [sys.executable, "-m", "deepspeed", *bind, *what]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        assert (tmp_path / "logs/rank_0.log").read_text().strip() == f"[{core}] {arguments}"


def test_the_launchers_process_id_is_in_a_file_while_it_runs(tmp_path, start, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    launcher = start(["--save_pid", "--num_gpus", "1"], WAIT)
    processes(tmp_path, 1)
    assert (tmp_path / f"{launcher.pid}.ds").read_text() == str(launcher.pid)
    launcher.send_signal(signal.SIGINT)
    assert launcher.wait(timeout=60) == 130
    assert not list(tmp_path.glob("*.ds"))
