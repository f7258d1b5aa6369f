"""The commands that start a job's ranks on its nodes, one class per tool.

A runner only makes commands, as data: the same on every machine, whether the tool is installed or not.
`deepspeed.launcher.remote` runs them. Two families:

- the remote shells *ssh* and *pdsh* start `deepspeed.launcher.launch` once per node, which starts the node's ranks;
- *openmpi*, *mpich*, *impi*, *mvapich* and *slurm* start `deepspeed.launcher.rank` once per rank, which learns its
  place from the variables of the tool.
"""

from __future__ import annotations

import shlex
import shutil
import signal
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from .errors import LaunchError
from .program import Program
from .world import World, encode_world_info

PDSH_SSH_ARGUMENTS = "PDSH_SSH_ARGS_APPEND"
"""The variable in which pdsh looks for more arguments for ssh."""


@dataclass(frozen=True)
class Command:
    """One process of this machine that starts ranks elsewhere. ``variables`` are set for it over the launcher's own;
    ``listens`` says that the node's entry reads what to do from its standard input; a command that does not is
    stopped by the signal ``stop``."""

    name: str
    arguments: tuple[str, ...]
    variables: Mapping[str, str] = field(default_factory=dict)
    listens: bool = False
    stop: signal.Signals = signal.SIGTERM

    def shell_line(self) -> str:
        """The command as a line for a shell."""
        setting = ["env", *(f"{key}={value}" for key, value in self.variables.items())] if self.variables else []
        return shlex.join([*setting, *self.arguments])


@dataclass(frozen=True)
class Job:
    """What a runner makes commands of. ``exports`` are the variables that every rank gets; ``folder`` is where ranks
    run; ``extra_arguments`` are the tool's, ``ssh_arguments`` those of ssh where the tool uses it; ``ssh_port`` 0 is ssh's
    own choice. Hosts that are not ``hosts_named`` are for the tool to choose."""

    world: World
    program: Program
    exports: Mapping[str, str]
    folder: str
    extra_arguments: tuple[str, ...] = ()
    ssh_arguments: tuple[str, ...] = ()
    ssh_port: int = 0
    hosts_named: bool = True

    @property
    def variables(self) -> dict[str, str]:
        """What ranks get from a tool that starts each of them: the exports, and where rank 0 listens, if known yet."""
        address = {"MASTER_ADDR": self.world.master_addr} if self.world.master_addr else {}
        return {**self.exports, **address, "MASTER_PORT": str(self.world.master_port)}

    def ranks_per_node(self, tool: str) -> int:
        """Ranks on each node, for a tool to which only one number can be given."""
        counts = {len(slots) for slots in self.world.pool.values()}
        if len(counts) > 1:
            each = ", ".join(f"{host}: {len(slots)}" for host, slots in self.world.pool.items())
            raise LaunchError(f"--launcher {tool} needs as many ranks on every host, got {each}; set --num_gpus")
        return counts.pop()


class MultiNodeRunner(ABC):
    """Makes the commands for a job. ``name`` is the tool's in ``--launcher``, ``executable`` the program it needs."""

    name: ClassVar[str]
    executable: ClassVar[str]

    def __init__(self, job: Job):
        self.job = job

    def backend_exists(self) -> bool:
        """Whether the tool is installed on this machine."""
        return shutil.which(self.executable) is not None

    @abstractmethod
    def commands(self) -> list[Command]:
        """The commands, in the order in which they are started."""

    def _node_entry(self, node_rank: str, *options: str) -> str:
        """A shell line that starts one node's ranks in place of the shell. It suits every login shell."""
        world = self.job.world
        words = [
            *("env", *(f"{key}={value}" for key, value in self.job.exports.items())),
            *(sys.executable, "-u", "-m", "deepspeed.launcher.launch"),
            f"--world_info={encode_world_info(world.pool)}",
            f"--node_rank={node_rank}",
            f"--master_addr={world.master_addr}",
            f"--master_port={world.master_port}",
            *options,
            *self.job.program.to_arguments(),
        ]
        return f"cd {shlex.quote(self.job.folder)} && exec {shlex.join(words)}"

    def _rank_entry(self) -> tuple[str, ...]:
        known = (f"--world_info={encode_world_info(self.job.world.pool)}",) if self.job.hosts_named else ()
        return (sys.executable, "-u", "-m", "deepspeed.launcher.rank", *known, *self.job.program.to_arguments())


class SSHRunner(MultiNodeRunner):
    """One ssh per node."""

    name = "ssh"
    executable = "ssh"

    def commands(self) -> list[Command]:
        """One ssh for each host, in order of rank."""
        return [
            Command(host, ("ssh", *ssh_arguments(self.job), host, self._node_entry(str(place), "--listen")), listens=True)
            for place, host in enumerate(self.job.world.pool)
        ]


def ssh_arguments(job: Job) -> tuple[str, ...]:
    """What ssh gets before the host, from whoever starts it. It never asks for a password."""
    port = ("-p", str(job.ssh_port)) if job.ssh_port else ()
    return ("-o", "BatchMode=yes", *port, *job.ssh_arguments)


class PDSHRunner(MultiNodeRunner):
    """One pdsh for all nodes: it fills in ``%n``, the node's place, and prefixes each line with its host.

    When one node fails it goes on waiting for the others (before its version 2.35, always), so nodes tell each other.
    """

    name = "pdsh"
    executable = "pdsh"

    def commands(self) -> list[Command]:
        """The one pdsh."""
        hosts = ",".join(self.job.world.pool)
        # -S: the nodes' exit code; -b: one interrupt ends all; -f: all at once.
        options = ("-S", "-b", "-f", str(len(self.job.world.pool)))
        entry = self._node_entry("RANK", "--peers").replace("%", "%%").replace("--node_rank=RANK", "--node_rank=%n", 1)
        variables = {"PDSH_RCMD_TYPE": "ssh", PDSH_SSH_ARGUMENTS: shlex.join(ssh_arguments(self.job))}
        return [
            Command("pdsh", ("pdsh", *options, *self.job.extra_arguments, "-w", hosts, entry), variables, stop=signal.SIGINT)
        ]


class OpenMPIRunner(MultiNodeRunner):
    """Open MPI's mpirun. Its pinning of each rank to one core is switched off: ranks have threads."""

    name = "openmpi"
    executable = "mpirun"

    def commands(self) -> list[Command]:
        """The one mpirun."""
        pool = self.job.world.pool
        hosts = ",".join(f"{host}:{len(slots)}" for host, slots in pool.items())
        exports = [word for key, value in self.job.variables.items() for word in ("-x", f"{key}={value}")]
        placement = ("-n", str(self.job.world.size), "--host", hosts, "--map-by", "slot", "--bind-to", "none")
        words = ("mpirun", *placement, *exports, *self.job.extra_arguments, *self._rank_entry())
        return [Command("mpirun", words)]


class MPICHRunner(MultiNodeRunner):
    """MPICH's mpiexec, by the name that no other MPI's has: where several are installed, mpiexec may be any of them."""

    name = "mpich"
    executable = "mpiexec.hydra"

    def commands(self) -> list[Command]:
        """The one mpiexec."""
        hosts = ",".join(f"{host}:{len(slots)}" for host, slots in self.job.world.pool.items())
        exports = [word for key, value in self.job.variables.items() for word in ("-genv", key, value)]
        placement = ("-n", str(self.job.world.size), "-hosts", hosts)
        words = (self.executable, *placement, *exports, *self.job.extra_arguments, *self._rank_entry())
        return [Command(self.executable, words)]


class MVAPICHRunner(MPICHRunner):
    """MVAPICH's mpiexec: MPICH's, with its pinning switched off, because ranks have threads."""

    name = "mvapich"

    def commands(self) -> list[Command]:
        """MPICH's, without pinning."""
        (command,) = super().commands()
        at = command.arguments.index(sys.executable)
        pinning = ("-genv", "MV2_ENABLE_AFFINITY", "0")
        if "MV2_ENABLE_AFFINITY" in self.job.exports:
            return [command]
        return [Command(command.name, (*command.arguments[:at], *pinning, *command.arguments[at:]))]


class IMPIRunner(MultiNodeRunner):
    """Intel MPI's mpirun, with as many ranks on every host and its pinning switched off."""

    name = "impi"
    executable = "mpirun"

    def commands(self) -> list[Command]:
        """The one mpirun."""
        per_node = str(self.job.ranks_per_node(self.name))
        exports = [word for key, value in {"I_MPI_PIN": "0", **self.job.variables}.items() for word in ("-genv", key, value)]
        placement = ("-n", str(self.job.world.size), "-ppn", per_node, "-hosts", ",".join(self.job.world.pool))
        words = ("mpirun", *placement, *exports, *self.job.extra_arguments, *self._rank_entry())
        return [Command("mpirun", words)]


class SlurmRunner(MultiNodeRunner):
    """Slurm's srun. Variables travel in srun's own environment, because its --export splits values at commas. Slurm
    orders the nodes in its own way, so each rank asks it where rank 0 is."""

    name = "slurm"
    executable = "srun"

    def commands(self) -> list[Command]:
        """The one srun."""
        pool = self.job.world.pool
        placement = (
            f"--nodes={len(pool)}",
            f"--ntasks={self.job.world.size}",
            f"--ntasks-per-node={self.job.ranks_per_node(self.name)}",
            *((f"--nodelist={','.join(pool)}",) if self.job.hosts_named else ()),
        )
        words = ("srun", *placement, "--export=ALL", "--kill-on-bad-exit=1", *self.job.extra_arguments)
        return [Command("srun", (*words, *self._rank_entry()), self.job.variables)]


RUNNERS: dict[str, type[MultiNodeRunner]] = {
    runner.name: runner
    for runner in (SSHRunner, PDSHRunner, OpenMPIRunner, MPICHRunner, IMPIRunner, MVAPICHRunner, SlurmRunner)
}
"""The runners by their names in ``--launcher``."""
