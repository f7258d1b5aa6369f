"""Starting the ranks of a benchmark on this machine: processes of one script, a thread each, talking over loopback."""

from __future__ import annotations

import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

TIMEOUT_SECONDS = 600


def run_ranks(command: Sequence[str], ranks: int, *, name: str, environment: Mapping[str, str] | None = None) -> None:
    """Run ``command`` (interpreter first) as every rank, and return when all have ended.

    Raises RuntimeError with the end of the output of the rank that failed, after ending the others.
    """
    with socket.socket() as probe, tempfile.TemporaryDirectory() as folder:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        logs = [Path(folder) / f"rank{rank}.log" for rank in range(ranks)]
        processes = []
        for rank, log in enumerate(logs):
            variables = {**_variables(command[0], rank=rank, ranks=ranks, port=port), **(environment or {})}
            with log.open("wb") as output:
                processes.append(subprocess.Popen(command, env=variables, stdout=output, stderr=subprocess.STDOUT))
        try:
            _wait(processes, logs, name)
        finally:
            for process in processes:
                process.kill()
                process.wait()


def _variables(python: str, *, rank: int, ranks: int, port: int) -> dict[str, str]:
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
        # An environment's own tools (a compiler's build driver, say) come first, as when it is activated.
        "PATH": f"{Path(python).parent}{os.pathsep}{os.environ.get('PATH', '')}",
    }


def _wait(processes: Sequence[subprocess.Popen[bytes]], logs: Sequence[Path], name: str) -> None:
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while any(process.poll() is None for process in processes):
        failed = [rank for rank, process in enumerate(processes) if process.poll()]
        if failed or time.monotonic() > deadline:
            break
        time.sleep(0.05)
    for rank, process in enumerate(processes):
        if process.poll():
            tail = "\n".join(logs[rank].read_text(errors="replace").splitlines()[-25:])
            raise RuntimeError(f"{name}: rank {rank} ended with status {process.returncode}:\n{tail}")
    if any(process.poll() is None for process in processes):
        raise RuntimeError(f"{name}: not finished after {TIMEOUT_SECONDS} s")
