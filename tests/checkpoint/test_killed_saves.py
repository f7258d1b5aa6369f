"""Two ranks that save are killed at random moments, again and again in one directory: what loads afterwards.

``DEEPSPEED_KILLS`` says how many times (12 without it).
"""

from __future__ import annotations

import os
import random
import signal
import socket
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

from deepspeed.checkpoint.background import BackgroundSaves, save_in_background
from deepspeed.checkpoint.directory import Attempt, find_checkpoint, read_latest, whole_checkpoints, write_checkpoint
from deepspeed.checkpoint.reader import WEIGHT, CheckpointReader, piece_name
from deepspeed.checkpoint.writer import Piece, Pieces

KILLS = int(os.environ.get("DEEPSPEED_KILLS", "12"))
NUMEL = 400_000
KEEP = 3


class Pair:
    """One of two processes on a connection; the end of one is an error of the other."""

    group = None
    size = 2

    def __init__(self, rank: int, connection: Connection):
        self.rank = rank
        self._connection = connection

    def gather_objects(self, value: object, *, purpose: str = "") -> list[Any]:
        self._connection.send(value)
        other = self._connection.recv()
        return [value, other] if self.rank == 0 else [other, value]


def save_as(rank: int, ends: tuple[Connection, Connection], directory: Path, value: int, background: bool) -> None:
    ends[1 - rank].close()
    communicator: Any = Pair(rank, ends[rank])
    attempt = Attempt(directory, tag_of(value), 2, keep=KEEP)
    named = {piece_name(WEIGHT, "a", rank * NUMEL): Piece(torch.full((NUMEL,), float(value)))}
    index = {"shapes": {"a": [2 * NUMEL]}, "value": value}
    if background:
        saves = BackgroundSaves()
        save_in_background(saves, attempt, [Pieces(named)], index, communicator, patience=0.3)
        saves.wait()
    else:
        write_checkpoint(attempt, [Pieces(named)], index, communicator)


def tag_of(value: int) -> str:
    """One time in three over the tag before."""
    return f"step{value - (value % 3 == 0)}"


def begun(directory: Path, value: int, background: bool) -> list[int]:
    """The processes of a save."""
    left, right = socket.socketpair()
    ends = Connection(left.detach()), Connection(right.detach())
    children = []
    for rank in range(2):
        child = os.fork()
        if child == 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            try:
                save_as(rank, ends, directory, value, background)
            except BaseException:
                os._exit(1)
            os._exit(0)
        children.append(child)
    for end in ends:
        end.close()
    return children


def ended(children: list[int]) -> bool:
    """Whether both went well."""
    return not any([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])


def check(path: Path) -> int:
    """The value of a checkpoint, every byte of which is read."""
    with CheckpointReader(path) as reader:
        reader.verify_all()
        value = reader.index["value"]
        assert torch.equal(reader.whole("a"), torch.full((2 * NUMEL,), float(value)))
        return int(value)


def seconds_of_a_save(directory: Path) -> float:
    begin = time.monotonic()
    assert ended(begun(directory, 1, background=False))
    return time.monotonic() - begin


@pytest.mark.timeout(60 + 5 * KILLS)
def test_saves_killed_at_random_moments_leave_the_last_good_checkpoint_and_no_torn_one(tmp_path):
    moments = random.Random(7)
    seconds = min(seconds_of_a_save(tmp_path) for _ in range(3))
    newest, torn, whole = 1, 0, 0
    for value in range(2, 2 + KILLS):
        children = begun(tmp_path, value, background=value % 2 == 0)
        time.sleep(moments.uniform(0.0, 1.1 * seconds))
        for child in moments.choice([children, children[:1], children[1:]]):
            os.kill(child, signal.SIGKILL)
        ended(children)
        found = check(find_checkpoint(tmp_path, str(read_latest(tmp_path))))
        assert found in (newest, value), f"{found} is the latest after a kill in the save of {value}; {newest} was before"
        torn, whole, newest = torn + (found != value), whole + (found == value), found
        offered = [path for path in tmp_path.iterdir() if path.is_dir() and not path.name.startswith(".")]
        assert sorted(offered) == sorted(whole_checkpoints(tmp_path))
        assert len({check(path) for path in offered}) == len(offered)
    assert torn, "no kill came before the end of its save"
    print(f"\n{KILLS} kills: {torn} saves ended before they were whole, {whole} after")
    assert ended(begun(tmp_path, value + 1, background=False))
    assert check(find_checkpoint(tmp_path, str(read_latest(tmp_path)))) == value + 1
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    assert len(whole_checkpoints(tmp_path)) == KEEP
