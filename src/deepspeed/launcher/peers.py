"""Nodes that were started by hand (``--no_ssh``) or by pdsh tell each other when a rank fails or a user interrupts.

The launcher of node 0 serves a small TCP store on the port after the master's. A key ``stop`` in it holds the first
such word; each node looks twice a second. This is a help, not a condition: where the port cannot be had or reached,
a node learns of another's end only when its own ranks' collectives fail.
"""

from __future__ import annotations

import json
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

from .node import Requests
from .world import Node

if TYPE_CHECKING:
    from torch._C._distributed_c10d import TCPStore

POLL_SECONDS = 0.5
LINGER_SECONDS = 2.0  # for the other nodes to read the last word before node 0 closes the store
_STOP, _DONE = "stop", "done"


def control_port(node: Node) -> int:
    """The port of the store: the one after rank 0's."""
    return node.world.master_port + 1


class Peers:
    """An attendant for `deepspeed.launcher.node.run_ranks` on one of several nodes started by hand."""

    def __init__(self, node: Node):
        self._node = node
        self._ended = threading.Event()

    @contextmanager
    def attend(self, requests: Requests) -> Iterator[None]:
        """Exchange requests to stop with the other nodes while the ranks run."""
        import torch.distributed  # noqa: F401  (before the thread starts: two threads must not import it at once)

        thread = threading.Thread(target=self._exchange, args=(requests,), name="peers", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._ended.set()
            thread.join(timeout=2 * LINGER_SECONDS)

    def _exchange(self, requests: Requests) -> None:
        store = self._serve() if self._node.rank == 0 else self._connect()
        if store is None:
            return
        try:
            said = False
            while not self._ended.wait(POLL_SECONDS):
                said = said or self._tell(store, requests)
                if not said and store.check([_STOP]):
                    self._obey(json.loads(store.get(_STOP)), requests)
                    said = True
                if store.check([_DONE]):
                    return
            self._tell(store, requests)
            if self._node.rank == 0:
                store.set(_DONE, "")
                time.sleep(LINGER_SECONDS)
        except RuntimeError:  # torch's errors of a store whose server is gone
            if not self._ended.is_set():
                requests.elsewhere = f"node 0 ({self._node.world.master_addr}) is gone"

    def _tell(self, store: TCPStore, requests: Requests) -> bool:
        """Leave word of what has happened here; returns whether anything has."""
        if not requests.signals and not requests.failed:
            return False
        number = requests.signals[0] if requests.signals else 0
        why = requests.failed or f"{self._node.host} received a signal"
        store.compare_set(_STOP, "", json.dumps({"signal": number, "why": f"{why} (node {self._node.rank})"}))
        return True

    def _obey(self, word: dict[str, str | int], requests: Requests) -> None:
        if word["signal"]:
            requests.signals.append(signal.Signals(int(word["signal"])))
        else:
            requests.elsewhere = str(word["why"])

    def _serve(self) -> TCPStore | None:
        from torch._C._distributed_c10d import TCPStore

        port = control_port(self._node)
        try:
            return TCPStore("0.0.0.0", port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=10))
        except RuntimeError as error:
            reason = f"port {port} is not free: {str(error).splitlines()[0]}"
            print(f"deepspeed: nodes cannot tell each other of a failure, because {reason}", file=sys.stderr)
            return None

    def _connect(self) -> TCPStore | None:
        from torch._C._distributed_c10d import TCPStore

        address = self._node.world.master_addr, control_port(self._node)
        last = False
        while not last:  # the last attempt is after the ranks' end: there may be word to leave of how they ended
            last = self._ended.wait(POLL_SECONDS)
            try:  # torch's own attempts write warnings until node 0 is there
                socket.create_connection(address, timeout=LINGER_SECONDS).close()
                return TCPStore(*address, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=10))
            except (OSError, RuntimeError):
                continue
        return None
