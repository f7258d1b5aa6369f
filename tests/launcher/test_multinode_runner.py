from __future__ import annotations

import shlex
import sys

import pytest

from deepspeed.launcher.errors import LaunchError
from deepspeed.launcher.multinode_runner import RUNNERS, Job
from deepspeed.launcher.program import Program
from deepspeed.launcher.world import World, decode_world_info, encode_world_info

POOL = {"a": [0, 1], "b": [2, 3]}
PROGRAM = Program("script", "train.py", ("--lr", "1e-3 x"))
INFO = f"--world_info={encode_world_info(POOL)}"
RANK = [sys.executable, "-u", "-m", "deepspeed.launcher.rank", INFO, "train.py", "--lr", "1e-3 x"]


def job(**changes):
    values = dict(
        world=World(POOL, "a", 29500),
        program=PROGRAM,
        exports={"NOTE": "50% of 'it'"},
        folder="/my work",
        extra_arguments=("--more", "1"),
    )
    return Job(**values | changes)


def arguments(name, **changes):
    (command,) = RUNNERS[name](job(**changes)).commands()
    return list(command.arguments)


def test_ssh_starts_the_node_entry_on_each_host_in_the_launchers_folder():
    commands = RUNNERS["ssh"](job(ssh_port=2222, ssh_arguments=("-F", "file"))).commands()
    assert [command.name for command in commands] == ["a", "b"] and all(command.listens for command in commands)
    for place, command in enumerate(commands):
        *prefix, host, line = command.arguments
        assert prefix == ["ssh", "-o", "BatchMode=yes", "-p", "2222", "-F", "file"] and host == "ab"[place]
        entry = [sys.executable, "-u", "-m", "deepspeed.launcher.launch", INFO, f"--node_rank={place}"]
        entry += ["--master_addr=a", "--master_port=29500", "--listen", "train.py", "--lr", "1e-3 x"]
        assert shlex.split(line) == ["cd", "/my work", "&&", "exec", "env", "NOTE=50% of 'it'", *entry]


def test_pdsh_fills_in_the_nodes_place_and_no_other_percent_sign():
    (command,) = RUNNERS["pdsh"](job(ssh_port=2222, ssh_arguments=("-F", "a file"))).commands()
    *options, line = command.arguments
    assert options == ["pdsh", "-S", "-b", "-f", "2", "--more", "1", "-w", "a,b"]
    ssh = "-o BatchMode=yes -p 2222 -F 'a file'"
    assert command.variables == {"PDSH_RCMD_TYPE": "ssh", "PDSH_SSH_ARGS_APPEND": ssh}
    words = shlex.split(line.replace("%n", "7").replace("%%", "%"))
    assert "--node_rank=7" in words and "NOTE=50% of 'it'" in words and "--peers" in words and "--listen" not in words


def test_open_mpi_starts_every_rank_unpinned():
    expected = ["mpirun", "-n", "4", "--host", "a:2,b:2", "--map-by", "slot", "--bind-to", "none"]
    expected += ["-x", "NOTE=50% of 'it'", "-x", "MASTER_ADDR=a", "-x", "MASTER_PORT=29500", "--more", "1"]
    assert arguments("openmpi") == expected + RANK


def test_mpich_starts_every_rank():
    exports = ["-genv", "NOTE", "50% of 'it'", "-genv", "MASTER_ADDR", "a", "-genv", "MASTER_PORT", "29500"]
    expected = ["mpiexec.hydra", "-n", "4", "-hosts", "a:2,b:2", *exports, "--more", "1"]
    assert arguments("mpich") == expected + RANK
    assert arguments("mvapich") == [*expected, "-genv", "MV2_ENABLE_AFFINITY", "0", *RANK]


def test_intel_mpi_starts_every_rank_unpinned():
    words = arguments("impi")
    assert words[:7] == ["mpirun", "-n", "4", "-ppn", "2", "-hosts", "a,b"] and words[-len(RANK) :] == RANK
    assert words[7:10] == ["-genv", "I_MPI_PIN", "0"]


def test_slurm_starts_every_rank_with_the_variables_in_its_own_environment():
    (command,) = RUNNERS["slurm"](job()).commands()
    placement = ["--nodes=2", "--ntasks=4", "--ntasks-per-node=2", "--nodelist=a,b"]
    expected = ["srun", *placement, "--export=ALL", "--kill-on-bad-exit=1", "--more", "1", *RANK]
    assert list(command.arguments) == expected
    assert command.variables == {"NOTE": "50% of 'it'", "MASTER_ADDR": "a", "MASTER_PORT": "29500"}
    assert shlex.split(command.shell_line())[:2] == ["env", "NOTE=50% of 'it'"]


def test_hosts_that_slurm_chooses_are_not_named():
    words = arguments("slurm", hosts_named=False)
    assert not any(word.startswith(("--nodelist", "--world_info")) for word in words)


@pytest.mark.parametrize("name", ["impi", "slurm"])
def test_a_tool_that_knows_one_number_of_ranks_per_node_refuses_several(name):
    with pytest.raises(LaunchError, match=f"--launcher {name} needs as many ranks on every host, got a: 1, b: 2"):
        arguments(name, world=World({"a": [0], "b": [0, 1]}, "a", 29500))


def test_world_information_survives_its_encoding():
    assert decode_world_info(encode_world_info(POOL)) == POOL
    with pytest.raises(LaunchError, match="--world_info"):
        decode_world_info("nonsense")
