"""A save that is killed, fails or is repeated: what loads afterwards, and what lies around."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from deepspeed.checkpoint.directory import (
    Attempt,
    CheckpointError,
    checksum,
    file_name,
    find_checkpoint,
    on_all_ranks,
    read_latest,
    write_checkpoint,
)
from deepspeed.checkpoint.writer import Piece, Pieces
from deepspeed.comm.communicator import Communicator
from deepspeed.native.hashing import EMPTY
from tests.checkpoint.saving import ALONE, is_saved, load, save


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_a_save_leaves_its_directory_and_latest(tmp_path):
    save(tmp_path / "deep" / "down", "first", 1.0)
    assert names(tmp_path / "deep" / "down") == ["first", "latest"]
    assert names(tmp_path / "deep" / "down" / "first") == ["index.json", "rank_00000.safetensors"]
    assert read_latest(tmp_path / "deep" / "down") == "first"
    assert is_saved(load(find_checkpoint(tmp_path / "deep" / "down", "first")), 1.0)


def test_the_newest_whole_checkpoints_stay_and_what_is_damaged_does_not_count(tmp_path):
    for number, tag in enumerate(["first", "second", "third"]):
        save(tmp_path, tag, float(number))
    (tmp_path / "third" / file_name(0)).write_bytes(b"cut short")
    (tmp_path / "mine").mkdir()
    save(tmp_path, "fourth", 4.0, keep=2)
    assert names(tmp_path) == ["fourth", "latest", "mine", "second", "third"]
    save(tmp_path, "fifth", 5.0, keep=1)
    assert names(tmp_path) == ["fifth", "latest", "mine", "third"]
    assert is_saved(load(tmp_path / "fifth"), 5.0)


def test_the_checkpoint_that_latest_names_stays_however_old_it_is(tmp_path):
    save(tmp_path, "first", 1.0)
    for tag in ("second", "third"):
        write_checkpoint(Attempt(tmp_path, tag, 1, keep=1, latest=False), [], {"shapes": {}}, ALONE)
    assert names(tmp_path) == ["first", "latest", "third"] and read_latest(tmp_path) == "first"


def test_leftovers_of_dead_saves_are_cleared_and_what_lives_is_left_alone(tmp_path):
    save(tmp_path, "first", 1.0)
    (tmp_path / "first").rename(tmp_path / ".first.replaced")
    for dead in (".old.saving", ".old.removed"):
        (tmp_path / dead).mkdir()
    claim = Attempt(tmp_path, "alive", 1).begin()
    with pytest.raises(CheckpointError, match="alive is being saved already"):
        save(tmp_path, "alive", 2.0)
    save(tmp_path, "second", 2.0)
    assert names(tmp_path) == [".alive.saving", "first", "latest", "second"]
    assert is_saved(load(tmp_path / "first"), 1.0)
    claim.release()
    save(tmp_path, "third", 3.0)
    assert names(tmp_path) == ["first", "latest", "second", "third"]


class Killed(BaseException):
    """Ends a save at once: nothing of this package catches it."""


def killed_at(moment: int, action: Callable[[], None]) -> bool:
    """Whether ``action`` came to its ``moment``-th step that changes the disk for good, where it was ended."""
    left = [moment]

    def dying(function: Any) -> Any:
        def call(*arguments: Any, **keywords: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                raise Killed
            return function(*arguments, **keywords)

        return call

    with pytest.MonkeyPatch.context() as patch:
        steps = [(os, "fsync"), (os, "unlink"), (os, "rmdir"), (Path, "rename"), (Path, "write_text"), (Path, "mkdir")]
        for owner, name in steps:
            patch.setattr(owner, name, dying(getattr(owner, name)))
        try:
            action()
        except Killed:
            return True
    return False


@pytest.mark.parametrize("tag", ["first", "second"], ids=["over the same tag", "under another tag"])
def test_a_save_killed_between_any_two_steps_leaves_a_good_checkpoint_and_the_next_clears_up(tmp_path, tag):
    moment, ended = 0, True
    while ended:
        moment += 1
        directory = tmp_path / str(moment)
        save(directory, "first", 1.0)
        ended = killed_at(moment, lambda directory=directory: save(directory, tag, 2.0))
        latest = read_latest(directory)
        assert latest is not None
        found = load(find_checkpoint(directory, latest))
        assert is_saved(found, 1.0) or is_saved(found, 2.0)
        save(directory, tag, 3.0)
        assert names(directory) == sorted({"first", tag, "latest"})
        assert is_saved(load(directory / tag), 3.0)
    assert moment > 8


def saved_while_rank_one_fails(directory: str) -> str:
    communicator = Communicator()
    path = Path(directory)
    save(path, "first", 1.0, communicator)
    tensors: Any = {"weight/a@0": Piece(torch.ones(3))} if communicator.rank == 0 else {"weight/a@3": "no tensor"}
    with pytest.raises(CheckpointError) as caught:
        write_checkpoint(Attempt(path, "second", 2), [Pieces(tensors)], {"shapes": {}}, communicator)
    return str(caught.value)


def test_a_rank_that_fails_is_named_on_every_rank_and_nothing_is_left(ranks, tmp_path):
    for message in ranks(2, saved_while_rank_one_fails, str(tmp_path)):
        assert "saving" in message and "failed on rank 1" in message
    assert names(tmp_path) == ["first", "latest"]


@pytest.mark.parametrize("tag", ["a/b", "/a", "..", ".", "", "latest"])
def test_a_tag_that_is_no_name_of_a_directory_is_refused(tmp_path, tag):
    with pytest.raises(CheckpointError, match="cannot be the name of a directory"):
        write_checkpoint(Attempt(tmp_path, tag, 1), [], {}, ALONE)
    assert names(tmp_path) == []


def test_a_checkpoint_that_is_not_there_is_answered_by_those_that_are(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint"):
        find_checkpoint(tmp_path / "nowhere", "first")
    save(tmp_path, "first", 1.0)
    save(tmp_path, "second", 2.0)
    with pytest.raises(CheckpointError, match=r"third does not exist; .* has first, second"):
        find_checkpoint(tmp_path, "third")
    assert read_latest(tmp_path / "nowhere") is None


def test_what_fails_names_what_was_done_and_where(tmp_path):
    def fail() -> None:
        raise OSError("disk full")

    with pytest.raises(CheckpointError, match="saving it failed on rank 0: disk full"):
        on_all_ranks(fail, "saving it", ALONE)


def test_a_checksum_is_that_of_the_bytes_whatever_the_dtype():
    values = torch.tensor([0.5, -1.0, 3.0])
    assert checksum(values) != checksum(values.bfloat16()) != checksum(values.half())
    assert checksum(values) == checksum(values.view(torch.int32)) == checksum(values.reshape(3, 1))
    assert checksum(torch.empty(0)) == checksum(torch.empty(0, 4)) == EMPTY
    assert checksum(torch.tensor(1.5)) == checksum(torch.tensor([1.5]))
