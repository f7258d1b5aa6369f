from __future__ import annotations

import errno

import pytest

from deepspeed.zero.arriving import Hops


class Reading:
    """A read that ends when it is told to, or when it is waited for."""

    def __init__(self, error: OSError | None = None):
        self.done = False
        self._error = error

    def wait(self) -> None:
        self.done = True
        if self._error is not None:
            raise self._error


class Begun:
    def wait(self) -> None:
        pass


def test_a_gather_begins_when_its_slice_has_been_read_and_not_before_those_that_were_asked_for_earlier():
    hops, begun = Hops(), []
    first, second = Reading(), Reading()
    for name, reading in (("first", first), ("second", second), ("in memory", None)):
        hops.start(reading, lambda name=name: begun.append(name) or Begun())
    second.done = True
    hops.advance()
    assert begun == []
    first.done = True
    hops.advance()
    assert begun == ["first", "second", "in memory"]


def test_who_waits_for_one_begins_all_before_it_and_none_behind_it():
    hops, order = Hops(), []
    made = [hops.start(Reading(), lambda name=name: order.append(name) or Begun()) for name in "abc"]
    made[1].wait()
    assert order == ["a", "b"]
    made[0].wait()
    assert order == ["a", "b"]


def test_who_waits_for_a_slice_that_could_not_be_read_hears_of_it_whoever_heard_before():
    hops = Hops()
    broken = hops.start(Reading(OSError(errno.EIO, "the disk is gone")), Begun)
    good = hops.start(Reading(), Begun)
    with pytest.raises(OSError, match="gone"):
        good.wait()
    good.wait()
    with pytest.raises(OSError, match="gone"):
        broken.wait()
