from __future__ import annotations

import pytest

from deepspeed.launcher import plan
from deepspeed.launcher.arguments import parse_args
from deepspeed.launcher.errors import LaunchError
from deepspeed.launcher.plan import make_plan
from deepspeed.launcher.world import Node


@pytest.fixture
def hosts(tmp_path):
    path = tmp_path / "hosts"
    path.write_text("worker-0 slots=4\nworker-1 slots=4\nworker-2 slots=2\n")
    return str(path)


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """A machine without accelerators; `monkeypatch` of the same names gives it some."""
    monkeypatch.setattr(plan, "accelerator_count", lambda: 0)
    monkeypatch.setattr(plan, "available_cores", lambda: [0, 1, 2, 3])


def planned(*options):
    return make_plan(parse_args([*options, "train.py"]), {})


def test_one_machine_without_accelerators_runs_one_rank_and_as_many_as_asked():
    assert planned().world.pool == {"localhost": [0]}
    assert planned("--num_gpus", "3").world.pool == {"localhost": [0, 1, 2]}
    assert planned("--num_gpus", "auto").world.pool == planned("--num_gpus", "-1").world.pool == {"localhost": [0]}


def test_one_machine_listens_on_loopback_at_a_free_port_unless_told():
    world = planned().world
    assert world.master_addr == "127.0.0.1" and world.master_port > 0
    assert planned("--master_port", "0").world.master_port > 0
    assert planned("--master_port", "1234", "--master_addr", "me").world.master_port == 1234


def test_accelerators_are_slots_of_which_include_and_exclude_choose(monkeypatch):
    monkeypatch.setattr(plan, "accelerator_count", lambda: 4)
    assert planned().world.pool == {"localhost": [0, 1, 2, 3]}
    assert planned("--num_gpus", "2").world.pool == {"localhost": [0, 1]}
    assert planned("--include", "localhost:1,3").world.pool == {"localhost": [1, 3]}
    assert planned("--exclude", "localhost:0").world.pool == {"localhost": [1, 2, 3]}
    with pytest.raises(LaunchError, match="--num_gpus 5 asks for more processes than the 4 slots of localhost"):
        planned("--num_gpus", "5")
    with pytest.raises(LaunchError, match="localhost has no slot 7"):
        planned("--include", "localhost:7")


def test_without_accelerators_include_chooses_among_the_cores():
    assert planned("--include", "localhost:0,2").world.pool == {"localhost": [0, 2]}


def test_a_hostfile_is_used_whole_or_its_first_hosts_and_slots(hosts):
    everything = planned("--hostfile", hosts)
    assert everything.world.size == 10 and everything.runner.name == "ssh"
    assert (everything.world.master_addr, everything.world.master_port) == ("worker-0", 29500)
    assert planned("--hostfile", hosts, "--num_nodes", "2", "--num_gpus", "3").world.pool == {
        "worker-0": [0, 1, 2],
        "worker-1": [0, 1, 2],
    }
    with pytest.raises(LaunchError, match="--num_gpus 3 asks for more processes than the 2 slots of worker-2"):
        planned("--hostfile", hosts, "--num_gpus", "3")
    with pytest.raises(LaunchError, match="--num_nodes 4 asks for more nodes than the 3 hosts"):
        planned("--hostfile", hosts, "--num_nodes", "4")


def test_one_host_left_that_is_not_this_machine_is_reached_over_ssh(hosts):
    assert planned("--hostfile", hosts, "--include", "worker-1").runner.name == "ssh"


def test_a_hostfile_of_this_machine_alone_needs_no_launcher_unless_told(tmp_path):
    path = tmp_path / "hosts"
    path.write_text("localhost slots=2\n")
    assert planned("--hostfile", str(path)).runner is None
    assert planned("--hostfile", str(path), "--force_multi").runner.name == "ssh"
    assert planned("--launcher", "OpenMPI", "--num_gpus", "2").runner.name == "openmpi"


def test_the_default_hostfile_is_used_where_it_exists(hosts, monkeypatch):
    monkeypatch.setattr(plan, "DEFAULT_HOSTFILE", hosts)
    assert planned().world.size == 10


def test_nodes_started_by_hand_know_their_place_from_a_hostfile_or_from_numbers(hosts):
    by_hand = planned("--hostfile", hosts, "--no_ssh", "--node_rank", "1")
    assert by_hand.runner is None and by_hand.world.master_addr == "worker-0"
    assert Node(by_hand.world, by_hand.node_rank, accelerators=False).first_rank == 4
    counted = planned("--no_ssh", "--node_rank", "1", "--num_nodes", "2", "--num_gpus", "3", "--master_addr", "boss")
    assert Node(counted.world, 1, accelerators=False).first_rank == 3
    assert (counted.world.size, counted.world.master_addr, counted.world.master_port) == (6, "boss", 29500)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num_nodes", "2"], "--num_nodes 2 needs a hostfile"),
        (["--no_ssh", "--node_rank", "0"], "--no_ssh needs to know the nodes"),
        (["--no_ssh", "--node_rank", "0", "--num_nodes", "2", "--num_gpus", "1"], "needs --master_addr HOST"),
        (["--no_ssh", "--node_rank", "0", "--num_nodes", "2", "--master_addr", "a"], "give --num_gpus N"),
        (["--launcher", "slurm", "--include", "a:0"], "give one"),
    ],
)
def test_nodes_that_cannot_be_known_are_an_error_with_the_remedy(options, message):
    with pytest.raises(LaunchError, match=message):
        planned(*options)


def test_a_loopback_address_is_no_master_for_other_machines(tmp_path):
    path = tmp_path / "hosts"
    path.write_text("localhost slots=1\nworker-1 slots=1\n")
    with pytest.raises(LaunchError, match="worker-1 cannot reach rank 0 at localhost; give --master_addr"):
        planned("--hostfile", str(path))


def test_any_loopback_address_is_this_machine(tmp_path):
    path = tmp_path / "hosts"
    path.write_text("127.0.0.1 slots=1\n127.0.0.2 slots=1\n")
    assert planned("--hostfile", str(path)).world.master_addr == "127.0.0.1"
    assert planned("--hostfile", str(path), "--include", "127.0.0.2").runner is None


def test_a_launchers_arguments_go_to_it_and_ssh_gets_its_own(hosts, monkeypatch):
    monkeypatch.setenv("PDSH_SSH_ARGS_APPEND", "-F 'a file'")
    extra = ["--hostfile", hosts, "--launcher_args=-x 1"]
    ssh, pdsh = planned(*extra).runner.job, planned(*extra, "--launcher", "pdsh").runner.job
    assert (ssh.extra_arguments, ssh.ssh_arguments) == ((), ("-x", "1"))
    assert (pdsh.extra_arguments, pdsh.ssh_arguments) == (("-x", "1"), ("-F", "a file"))


def test_an_argument_that_begins_with_a_dash_is_refused_with_the_way_to_write_it(capsys):
    with pytest.raises(SystemExit):
        parse_args(["--launcher_args", "--allow-run-as-root", "train.py"])
    assert "--launcher_args=VALUE" in capsys.readouterr().err


def test_slurm_chooses_the_nodes_where_no_hostfile_names_them():
    job = planned("--launcher", "slurm", "--num_nodes", "2", "--num_gpus", "4").runner.job
    assert job.world.size == 8 and not job.hosts_named and "MASTER_ADDR" not in job.variables
