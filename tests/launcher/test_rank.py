from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from threading import Timer

import pytest

from deepspeed.launcher.errors import LaunchError
from deepspeed.launcher.rank import Place, find_place, first_host, master_address, rank_settings, slots_here, wait_until_read
from deepspeed.launcher.world import encode_world_info
from tests.launcher.conftest import SOURCE

OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
}
HYDRA = {"PMI_RANK": "5", "MPI_LOCALRANKID": "1", "PMI_SIZE": "8", "MPI_LOCALNRANKS": "4"}
SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_NODEID": "1",
}


@pytest.mark.parametrize("variables", [OPEN_MPI, HYDRA, SLURM, {**SLURM, "PMI_RANK": "5", "PMI_SIZE": "8"}])
def test_mpi_and_slurm_say_where_a_rank_is(variables):
    assert find_place(variables) == Place(rank=5, local_rank=1, size=8, local_size=4)


def test_mpi_within_a_slurm_job_speaks_for_itself():
    job = {**SLURM, "SLURM_PROCID": "0"}
    assert find_place({**job, **OPEN_MPI}).rank == find_place({**job, **HYDRA}).rank == 5


def test_slurm_may_run_another_number_of_ranks_on_each_node():
    assert find_place({**SLURM, "SLURM_STEP_TASKS_PER_NODE": "4(x1),3,1", "SLURM_NODEID": "1"}).local_size == 3


def test_a_process_that_nobody_started_as_a_rank_is_an_error():
    with pytest.raises(LaunchError, match="start it by mpirun or srun"):
        find_place({"PMI_RANK": "0"})


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("gpu[003-007,9],login1", "gpu003"), ("a,b", "a"), ("n7", "n7"), ("r[1-2].cluster,x", "r1.cluster"), ("a,b[1-2]", "a")],
)
def test_the_first_of_slurms_nodes_has_rank_0(nodes, first):
    assert first_host(nodes) == first


def test_rank_0_is_found_from_the_user_slurm_or_this_machine():
    several, alone = Place(5, 1, 8, 4), Place(1, 1, 2, 2)
    assert master_address({"MASTER_ADDR": "boss", "SLURM_JOB_NODELIST": "a,b"}, several) == "boss"
    assert master_address({"SLURM_JOB_NODELIST": "a,b"}, several) == "a"
    assert master_address({}, alone) == master_address({"SLURM_JOB_NODELIST": "a"}, alone) == "127.0.0.1"
    with pytest.raises(LaunchError, match="MASTER_ADDR is not set"):
        master_address({}, several)


def test_slots_come_from_the_nodes_name_or_the_order_of_ranks():
    pool = {"b": [0, 1], "a": [2, 3]}
    assert slots_here(pool, Place(2, 0, 4, 2), "") == [2, 3]
    assert slots_here(pool, Place(2, 0, 4, 2), "b") == [0, 1]
    with pytest.raises(LaunchError, match="a runs 1 ranks and was to run 2"):
        slots_here(pool, Place(2, 0, 4, 1), "")


def test_a_rank_sees_the_accelerators_of_its_slots():
    pool = {"a": [0, 1], "b": [1, 3, 5, 7]}
    place = {**OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "6", "MASTER_ADDR": "a"}
    settings = rank_settings(place, pool, accelerators=True, cores=3)
    assert settings["CUDA_VISIBLE_DEVICES"] == "1,3,5,7" and settings["OMP_NUM_THREADS"] == "3"
    assert "OMP_NUM_THREADS" not in rank_settings({**place, "OMP_NUM_THREADS": "9"}, pool, accelerators=True, cores=3)


def run_rank(
    tmp_path: Path, script: str, starter: dict[str, str] = OPEN_MPI, pass_fds: Sequence[int] = ()
) -> subprocess.CompletedProcess[str]:
    path = tmp_path / "script.py"
    path.write_text(script)
    variables = {**starter, "MASTER_ADDR": "boss", "PYTHONPATH": str(SOURCE), "DS_ACCELERATOR": "cpu"}
    pool = encode_world_info({"a": [0, 1, 2, 3], "b": [0, 1, 2, 3]})
    command = [sys.executable, "-m", "deepspeed.launcher.rank", f"--world_info={pool}", str(path), "--flag"]
    environment = {**os.environ, **variables}
    return subprocess.run(command, env=environment, pass_fds=pass_fds, capture_output=True, text=True, timeout=60)


def test_the_entry_becomes_the_script_with_the_usual_variables(tmp_path):
    names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT"]
    result = run_rank(tmp_path, f"import os, sys\nprint(*[os.environ[n] for n in {names}], *sys.argv[1:])")
    assert result.stdout.split() == ["5", "1", "8", "4", "boss", "29500", "--local_rank=1", "--flag"], result.stderr


def test_a_script_that_raises_shows_its_own_part_of_the_traceback_and_fails(tmp_path):
    result = run_rank(tmp_path, "raise ValueError('no such luck')")
    assert result.returncode == 1 and "ValueError: no such luck" in result.stderr
    assert "rank 5 failed on" in result.stderr and "rank.py" not in result.stderr


@pytest.mark.parametrize(
    ("script", "code", "said"),
    [
        ("raise ValueError", 1, b"cmd=abort exitcode=1\n"),
        ("import sys; sys.exit(7)", 7, b"cmd=abort exitcode=7\n"),
        ("import sys; sys.exit(130)", 130, b""),
        ("", 0, b""),
    ],
)
def test_hydra_is_told_of_a_failure_but_not_of_an_interrupt(tmp_path, script, code, said):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        result = run_rank(tmp_path, script, {**HYDRA, "PMI_FD": str(theirs.fileno())}, pass_fds=[theirs.fileno()])
        theirs.close()
        assert result.returncode == code and ours.recv(100) == said


def test_what_a_pipe_holds_is_waited_for_until_it_is_read_or_the_time_is_over():
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb", buffering=0) as reader, os.fdopen(writing, "wb", buffering=0) as writer:
        writer.write(b"the last words")
        assert not wait_until_read(writer.fileno(), limit=0.05)
        Timer(0.05, reader.read, [100]).start()
        assert wait_until_read(writer.fileno(), limit=60)
