"""Running a runner's commands from this machine, until all have ended or one has failed, and stopping the rest."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress

from .errors import LaunchError
from .multinode_runner import Command, Job, ssh_arguments
from .node import FAILURE_GRACE_SECONDS, POLL_SECONDS, Requests, listening, say
from .worker import end_with

REACH_SECONDS = 10  # for a host to answer
NODE_STOP_SECONDS = FAILURE_GRACE_SECONDS + 7.0  # for a node to take its ranks down
SSH_FAILED = 255


def check_reachable(job: Job) -> None:
    """Raise LaunchError that names the hosts on which ssh cannot run a command without asking for a password."""
    prefix = ("ssh", *ssh_arguments(job), "-o", f"ConnectTimeout={REACH_SECONDS}")
    attempts = {
        host: subprocess.Popen(
            (*prefix, host, "true"), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        for host in job.world.pool
    }
    failed = []
    for host, attempt in attempts.items():
        _, errors = attempt.communicate()
        if attempt.returncode:
            failed.append(f"{host}: {errors.strip() or f'exit code {attempt.returncode}'}")
    if failed:
        raise LaunchError(
            "cannot run commands over ssh, which must work without a password, on\n  "
            + "\n  ".join(failed)
            + f"\ntry: {' '.join(prefix)} {failed[0].partition(':')[0]} true  (--no_ssh_check skips this check)"
        )


def run_commands(commands: Sequence[Command], *, grace_seconds: float) -> int:
    """Run the commands side by side; returns 0, the first failed one's exit code, or 128 + the number of the signal
    that has ended them. The others are stopped within seconds of a failure; a signal is passed on, and nodes then have
    ``grace_seconds``, or until a second signal comes."""
    with listening() as requests:
        started = [_Remote(command) for command in commands]
        try:
            return _watch(started, requests, grace_seconds)
        finally:
            for remote in started:
                remote.kill()


def _watch(started: list[_Remote], requests: Requests, grace_seconds: float) -> int:
    while True:
        if requests.signals:
            return _interrupt(started, requests, grace_seconds)
        failed = next((remote for remote in started if remote.poll()), None)
        if failed is not None:
            code = failed.poll() or 0
            say(f"deepspeed: {failed.account(code)}")
            _stop(started)
            return 128 - code if code < 0 else code
        if all(remote.poll() == 0 for remote in started):
            return 0
        time.sleep(POLL_SECONDS)


def _interrupt(started: list[_Remote], requests: Requests, grace_seconds: float) -> int:
    number = requests.signals[0]
    for remote in started:
        remote.send(number)
    _wait(started, grace_seconds + NODE_STOP_SECONDS, lambda: len(requests.signals) > 1)
    _stop(started)
    return 128 + number


def _stop(started: list[_Remote]) -> None:
    for remote in started:
        remote.stop()
    _wait(started, NODE_STOP_SECONDS)


def _wait(started: Iterable[_Remote], seconds: float, enough: Callable[[], bool] = lambda: False) -> None:
    deadline = time.monotonic() + seconds
    while any(remote.poll() is None for remote in started) and time.monotonic() < deadline and not enough():
        time.sleep(POLL_SECONDS)


class _Remote:
    """A started command. It is in a session of its own, so that Ctrl-C reaches it only as we pass it on."""

    def __init__(self, command: Command):
        self._command = command
        launcher = os.getpid()
        self._process = subprocess.Popen(
            command.arguments,
            env={**os.environ, **command.variables},
            stdin=subprocess.PIPE if command.listens else subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=lambda: end_with(launcher, command.stop),
        )

    def poll(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""
        return self._process.poll()

    def account(self, code: int) -> str:
        """How the command has failed, in one line."""
        name = self._command.name
        if self._command.listens and code == SSH_FAILED:
            return f"ssh could not reach {name}, or lost it (exit code {code}; its message is above)"
        return f"{name} ended with exit code {code}" if code > 0 else f"{name} was killed by signal {-code}"

    def send(self, number: int) -> None:
        """Pass a signal on to the ranks: by way of the node's entry, or as the one that the tool understands."""
        if self._process.stdin is None:
            self._process.send_signal(self._command.stop)
        else:
            with suppress(OSError):
                self._process.stdin.write(signal.Signals(number).name.encode() + b"\n")
                self._process.stdin.flush()

    def stop(self) -> None:
        """End the ranks without waiting for them to save."""
        if self._process.stdin is not None:
            with suppress(OSError):
                self._process.stdin.close()
        else:
            self._process.send_signal(self._command.stop)

    def kill(self) -> None:
        """End what is left of the command."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
