"""Jobs on two nodes, started for real by each of the tools that this machine has: an ssh server of our own on two
loopback addresses, and over it ssh, pdsh, Open MPI and MPICH; and Slurm with two nodes of our own."""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.launcher.conftest import TRAIN, WAIT, Start, ended, processes, saved, trained, wait_until, write_program

ADDRESSES = ("127.0.0.1", "127.0.0.2")
SAVES_WHEN_TERMINATED = "import signal\nsignal.signal(signal.SIGTERM, signal.default_int_handler)\n" + WAIT


@dataclass(frozen=True)
class Tool:
    """One launcher, the programs that it needs, its options here, and whether it lets ranks save after an interrupt."""

    name: str
    programs: tuple[str, ...]
    options: tuple[str, ...] = ()
    lets_ranks_save: bool = True

    def __str__(self) -> str:
        return self.name


OPEN_MPI = "--oversubscribe --mca oob_tcp_if_include lo --mca plm_rsh_agent ssh" + " --allow-run-as-root" * (os.geteuid() == 0)
SSH = ("ssh", "sshd", "ssh-keygen")
SLURM = ("srun", "slurmctld", "slurmd", "munged")
TOOLS = [
    Tool("ssh", SSH),
    Tool("pdsh", ("pdsh", *SSH)),
    Tool("openmpi", ("ompi_info", "mpirun", *SSH), (f"--launcher_args={OPEN_MPI}",)),
    Tool("mpich", ("mpiexec.hydra", *SSH), ("--launcher_args=-localhost 127.0.0.1",)),
    Tool("slurm", SLURM, ("--num_nodes=2", "--num_gpus=2", "--launcher_args=--overcommit"), lets_ranks_save=False),
]


def find(program: str) -> str | None:
    """Where a program is, those for administrators too."""
    return shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin")


@dataclass
class Services:
    """Servers of a test session: programs in the foreground, ended with it."""

    folder: Path
    stack: ExitStack

    def run(self, *command: object, **variables: str) -> None:
        """Start one."""
        log = (self.folder / f"{Path(str(command[0])).name}.log").open("a")
        words = [find(str(command[0])) or "", *map(str, command[1:])]
        process = subprocess.Popen(words, stdout=log, stderr=log, env={**os.environ, **variables}, cwd=self.folder)
        self.stack.callback(process.wait)
        self.stack.callback(process.terminate)


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Services]:
    with ExitStack() as stack:
        yield Services(tmp_path_factory.mktemp("services"), stack)


@pytest.fixture(scope="module")
def ssh(services: Services) -> str:
    """A program in place of ssh that reaches our own server on both loopback addresses."""
    folder, port = services.folder, free_port()
    for key in ("key", "host_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / key], check=True)
    server = {
        "Port": port,
        "HostKey": folder / "host_key",
        "AuthorizedKeysFile": folder / "key.pub",
        "PidFile": "none",
        "StrictModes": "no",
        "UsePAM": "no",
    }
    lines = [f"{key} {value}" for key, value in server.items()] + [f"ListenAddress {address}" for address in ADDRESSES]
    (folder / "sshd_config").write_text("\n".join(lines) + "\n")
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # where a server run by root locks itself in
    services.run("sshd", "-D", "-e", "-f", folder / "sshd_config")
    wait_until(lambda: all(answers(address, port) for address in ADDRESSES))
    client = {
        "IdentityFile": folder / "key",
        "IdentitiesOnly": "yes",
        "Port": port,
        "StrictHostKeyChecking": "no",
        "UserKnownHostsFile": folder / "known_hosts",
        "LogLevel": "ERROR",
    }
    (folder / "ssh_config").write_text("".join(f"{key} {value}\n" for key, value in client.items()))
    return f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder / "ssh_config"} "$@"\n'


@pytest.fixture(scope="module")
def slurm(services: Services) -> Iterator[dict[str, str]]:
    """The variables with which Slurm's programs find our own two nodes, on ports of loopback."""
    if os.geteuid() != 0:
        pytest.skip("Slurm's servers run as root")
    folder, host, user = services.folder, socket.gethostname(), getpass.getuser()
    (folder / "munge_key").write_bytes(os.urandom(1024))
    (folder / "munge_key").chmod(0o400)
    munge = {"key-file": "munge_key", "socket": "munge", "pid-file": "munge_pid", "seed-file": "munge_seed"}
    options = [f"--{option}={folder / name}" for option, name in munge.items()]
    services.run("munged", "--foreground", "--force", *options)
    nodes = [f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={free_port()} CPUs=2" for name in "ab"]
    configuration = f"""
        ClusterName=test
        SlurmctldHost={host}(127.0.0.1)
        SlurmctldPort={free_port()}
        SlurmUser={user}
        SlurmdUser={user}
        AuthType=auth/munge
        AuthInfo=socket={folder / "munge"}
        CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
        StateSaveLocation={folder}
        SlurmctldPidFile={folder / "slurmctld_pid"}
        SlurmdPidFile={folder / "%n_pid"}
        SlurmdSpoolDir={folder / "%n"}
        ProctrackType=proctrack/pgid
        ReturnToService=2
        {nodes[0]}
        {nodes[1]}
        PartitionName=main Nodes=a,b Default=YES
    """
    (folder / "slurm.conf").write_text("\n".join(line.strip() for line in configuration.splitlines()))
    variables = {"SLURM_CONF": str(folder / "slurm.conf")}
    services.run("slurmctld", "-D", **variables)
    for name in "ab":
        (folder / name).mkdir()
        services.run("slurmd", "-D", "-N", name, **variables)
    wait_until(lambda: idle_nodes(variables) == 2)
    yield variables
    wait_until(lambda: idle_nodes(variables) == 2)  # its processes of the last job end only while its servers run


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def answers(address: str, port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((address, port)) == 0


def idle_nodes(variables: dict[str, str]) -> int:
    command = ["sinfo", "--noheader", "--states=idle", "--format=%D"]
    answer = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True, timeout=30)
    return int(answer.stdout or 0)


@pytest.fixture(params=TOOLS, ids=str)
def tool(request: pytest.FixtureRequest) -> Tool:
    missing = [program for program in request.param.programs if find(program) is None]
    if missing or sys.platform != "linux":
        pytest.skip(f"{request.param.name} is not installed: no {', '.join(missing)}")
    return request.param


@pytest.fixture
def job(
    tool: Tool, start: Start, port: int, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], subprocess.Popen[str]]:
    """``job(script)``: the launcher of a job of two nodes with two ranks each."""
    options = ["--launcher", tool.name, "--master_port", str(port), "--env", "NOTE=a'b%c, $x", *tool.options]
    if tool.name == "slurm":
        monkeypatch.setenv("SLURM_CONF", request.getfixturevalue("slurm")["SLURM_CONF"])
        options += ["--master_addr", ADDRESSES[0]]
    else:
        write_program(tmp_path / "bin/ssh", request.getfixturevalue("ssh"))
        (tmp_path / "hosts").write_text("".join(f"{address} slots=2\n" for address in ADDRESSES))
        options += ["--hostfile", "hosts"]
    return lambda script: start(options, script)


def test_four_ranks_on_two_nodes_train_together(job, tmp_path):
    launcher = job(TRAIN)
    _, errors = launcher.communicate(timeout=100)
    assert launcher.returncode == 0, errors
    assert [(tmp_path / f"{rank}.done").read_text() for rank in range(4)] == trained("a'b%c, $x")


def test_a_failing_rank_takes_the_other_node_down(job, tool, tmp_path):
    launcher = job(WAIT)
    ranks = processes(tmp_path, 4)
    (tmp_path / "fail").touch()
    _, errors = launcher.communicate(timeout=30)
    # srun's code is the highest of all ranks', those that it has ended too.
    assert launcher.returncode == (128 + signal.SIGTERM if tool.name == "slurm" else 1), errors
    assert "ValueError: no such luck" in errors and "rank 3 failed on" in errors
    wait_until(lambda: all(ended(rank) for rank in ranks))


def test_an_interrupt_ends_all_ranks(job, tool, tmp_path):
    launcher = job(SAVES_WHEN_TERMINATED)
    ranks = processes(tmp_path, 4)
    launcher.send_signal(signal.SIGINT)
    _, errors = launcher.communicate(timeout=30)
    assert launcher.returncode == 130, errors
    wait_until(lambda: all(ended(rank) for rank in ranks))
    assert saved(tmp_path) == (["0", "1", "2", "3"] if tool.lets_ranks_save else [])


@pytest.mark.parametrize("tool", [tool for tool in TOOLS if tool.name in ("pdsh", "openmpi")], ids=str, indirect=True)
def test_no_rank_outlives_a_launcher_that_was_killed(job, tmp_path):
    launcher = job(WAIT)
    ranks = processes(tmp_path, 4)
    launcher.kill()
    wait_until(lambda: all(ended(rank) for rank in ranks))
