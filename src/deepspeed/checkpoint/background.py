"""A save that goes on beside training, from copies in CPU memory.

Each rank has a thread that writes its file, and then a *receipt* beside it: what it has written, or why it has not. Rank 0's
thread waits for all receipts and publishes. Ranks speak through files alone, so that nothing that the training sends, nor the
end of its process groups, has to do with it. The threads are no daemons: a process that ends waits for them.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..comm.communicator import Communicator
from .directory import Attempt, CheckpointError, begin_on_all_ranks, file_name, on_all_ranks
from .ownership import Claim
from .writer import Pieces, Written

POLL_SECONDS = 0.02

logger = logging.getLogger("DeepSpeed")


class BackgroundSaves:
    """The save of one engine that is on its way: one at a time."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._failure: CheckpointError | None = None

    def start(self, work: Callable[[], None], what: str) -> None:
        """Begin ``work``, in whose errors ``what`` says what it was. The last save has been waited for."""
        assert self._thread is None, "the last save is still on its way"

        def run() -> None:
            try:
                work()
            except Exception as error:
                self._failure = error if isinstance(error, CheckpointError) else CheckpointError(f"{what} failed: {error}")
                logger.error("%s", self._failure)

        self._thread = threading.Thread(target=run, name=what)
        self._thread.start()

    def wait(self) -> None:
        """Return when no save is on its way; raise CheckpointError, once, where the last one failed on this rank."""
        if self._thread is not None:
            self._thread.join()
        self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure


def save_in_background(
    saves: BackgroundSaves,
    attempt: Attempt,
    groups: Sequence[Pieces],
    index: Mapping[str, Any],
    communicator: Communicator,
    patience: float,
) -> None:
    """As ``write_checkpoint``, but return when the ``groups`` have been copied. A rank from which nothing comes for
    ``patience`` seconds is taken for dead. Called on all ranks."""
    what, rank = f"saving {attempt.directory / attempt.tag}", communicator.rank
    claim = begin_on_all_ranks(attempt, communicator)
    try:
        copies = on_all_ranks(lambda: [group.snapshot() for group in groups], what, communicator)
    except CheckpointError:
        _give_up(attempt, claim)
        raise

    def work() -> None:
        if rank:
            _leave_receipt(attempt, rank, copies)
        else:
            _write_and_publish(attempt, copies, index, claim, patience)

    saves.start(work, f"{what} on rank {rank}")


def _leave_receipt(attempt: Attempt, rank: int, groups: list[Pieces]) -> None:
    path = attempt.temporary / _receipt_name(rank)
    try:
        receipt = asdict(attempt.write(rank, groups))
    except BaseException as error:
        receipt = {"error": f"{type(error).__name__}: {error}"}
        raise
    finally:
        groups.clear()
        if attempt.temporary.is_dir():  # else rank 0 has given up
            temporary = path.with_name(f".{path.name}")
            temporary.write_text(json.dumps(receipt))
            temporary.rename(path)


def _write_and_publish(attempt: Attempt, groups: list[Pieces], index: Mapping[str, Any], claim: Claim, patience: float) -> None:
    try:
        own = attempt.write(0, groups)
        groups.clear()
        others = _receipts(attempt, patience)
        for rank in range(1, attempt.ranks):
            (attempt.temporary / _receipt_name(rank)).unlink()
        attempt.publish(index, [own, *others])
        claim.release()
    except BaseException:
        _give_up(attempt, claim)
        raise


def _give_up(attempt: Attempt, claim: Claim) -> None:
    if claim.held:
        attempt.abandon()
    claim.release()


def _receipts(attempt: Attempt, patience: float) -> list[Written]:
    """What the other ranks have written, once all have. Raises CheckpointError where one failed, and where nothing has come
    for ``patience`` seconds."""
    found: dict[int, Written] = {}
    before, since = -1, time.monotonic()
    while len(found) < attempt.ranks - 1:
        for rank in range(1, attempt.ranks):
            path = attempt.temporary / _receipt_name(rank)
            if rank not in found and path.exists():
                found[rank] = _read_receipt(path, rank, attempt)
        there = sum(path.stat().st_blocks for path in attempt.temporary.iterdir())
        if there != before:
            before, since = there, time.monotonic()
        if time.monotonic() - since > patience:
            missing = ", ".join(str(rank) for rank in range(1, attempt.ranks) if rank not in found)
            raise CheckpointError(
                f"saving {attempt.directory / attempt.tag} failed: nothing has come from the ranks {missing} for "
                f"{patience:.0f} s; do all see the same directory?"
            )
        time.sleep(POLL_SECONDS)
    return [found[rank] for rank in sorted(found)]


def _read_receipt(path: Path, rank: int, attempt: Attempt) -> Written:
    receipt = json.loads(path.read_text())
    if "error" in receipt:
        raise CheckpointError(f"saving {attempt.directory / attempt.tag} failed on rank {rank}: {receipt['error']}")
    return Written(**receipt)


def _receipt_name(rank: int) -> str:
    return f"{file_name(rank)}.receipt"
