"""A pool of warm gloo workers: real processes for distributed tests, started once per session.

``Pool.run(n, function, *args)`` calls ``function(*args)`` in ``n`` processes, each within a fresh default process
group of ``n`` ranks, and returns the results in rank order. ``function`` is a module-level function of a test module.
A failure on any rank is raised with that rank's traceback; ranks that then do not answer are killed and replaced.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

GRACE_SECONDS = 3.0
"""How long the other ranks may go on after one has failed."""


class RankError(AssertionError):
    """One or more ranks raised; the message holds their tracebacks."""


class _Worker:
    def __init__(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "torch.distributed", "tests.pool"])
        self.connection, remote = context.Pipe()
        self.process = context.Process(target=_serve, args=(remote,), daemon=True)
        self.process.start()
        remote.close()

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


class Pool:
    def __init__(self) -> None:
        self._workers: list[_Worker] = []

    def run(self, ranks: int, function: Callable[..., Any], *args: Any, timeout: float = 60.0) -> list[Any]:
        while len(self._workers) < ranks:
            self._workers.append(_Worker())
        with tempfile.TemporaryDirectory() as directory:
            store = str(Path(directory) / "store")
            for rank, worker in enumerate(self._workers[:ranks]):
                call = (rank, ranks, store, function.__module__, function.__qualname__, args)
                worker.connection.send_bytes(pickle.dumps(call))
            answers = self._collect(ranks, timeout)
        failures = [f"--- rank {rank} ---\n{text}" for rank, (ok, text) in sorted(answers.items()) if not ok]
        if failures or len(answers) < ranks:
            self.close()
            silent = sorted(set(range(ranks)) - set(answers))
            raise RankError("\n".join(failures + [f"no answer from ranks {silent}"] * bool(silent)))
        return [answers[rank][1] for rank in range(ranks)]

    def _collect(self, ranks: int, timeout: float) -> dict[int, tuple[bool, Any]]:
        waiting: dict[Connection, int] = {self._workers[rank].connection: rank for rank in range(ranks)}
        answers: dict[int, tuple[bool, Any]] = {}
        deadline = time.monotonic() + timeout
        while waiting:
            ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for connection in ready:
                rank = waiting.pop(connection)
                try:
                    answers[rank] = pickle.loads(connection.recv_bytes())
                except (EOFError, OSError):
                    answers[rank] = False, "the process died"
                if not answers[rank][0]:
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        return answers

    def close(self) -> None:
        for worker in self._workers:
            worker.stop()
        self._workers.clear()


def _serve(connection: Connection) -> None:
    torch.set_num_threads(1)
    while True:
        try:
            rank, ranks, store, module, name, args = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        try:
            connection.send_bytes(pickle.dumps((True, _call(rank, ranks, store, module, name, args))))
        except BaseException:
            connection.send_bytes(pickle.dumps((False, traceback.format_exc())))


def _call(rank: int, ranks: int, store: str, module: str, name: str, args: tuple[Any, ...]) -> Any:
    function = importlib.import_module(module)
    for part in name.split("."):
        function = getattr(function, part)
    size = str(ranks)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=size, LOCAL_WORLD_SIZE=size)
    dist.init_process_group("gloo", store=dist.FileStore(store, ranks), rank=rank, world_size=ranks)
    # A rank that is done at once must not close connections that another is still making.
    dist.barrier()
    torch.manual_seed(0)
    try:
        return function(*args)
    finally:
        dist.destroy_process_group()
