"""Whether ranks come to the same collectives: each says what it is about to do, and none begins before all said the same.

They say so in the store of the process groups, not by a collective: a rank may never come to the same one. One operation:

1. ``announce``: this rank writes what it does as the next operation of the channel (there is one for each group);
2. ``wait``: it waits until all ranks of the group have written theirs, and compares. Only then the operation begins: where
   ranks differ, nothing is under way. Meanwhile it begins whatever else of its own all ranks have come to, as another rank
   may be waiting for that;
3. after a while it also writes whom it waits for, and looks where these are. Where everybody on whom it depends waits
   too, or has left, nobody can go on.

The rank that finds something wrong writes the *verdict*: all ranks raise it, each when it looks next.
"""

from __future__ import annotations

import atexit
import json
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta

import torch.distributed as dist
from torch._C._distributed_c10d import Store

from .operations import Collective, CollectiveError, Pending

PATIENCE_SECONDS = 0.5
"""After so long a rank writes whom it waits for, and looks where these are."""

LONGEST_PAUSE_SECONDS = 0.05
"""Between two looks into the store."""

LINGER_SECONDS = 5.0
"""How long a rank that raises waits for the others to have read the verdict: the store may end with its program."""

REMEDY = (
    "All ranks must call the engine alike and run the same modules in the same order; modules that branch differently on "
    "each rank belong in a leaf (deepspeed.utils.set_z3_leaf_modules)."
)


@dataclass(frozen=True)
class Whereabouts:
    """What a rank did last, or does. While it waits, ``lacks`` has, by rank, the keys of the store that are to appear.
    ``has_left``: it will write nothing more."""

    what: str
    since: str
    lacks: Mapping[str, str] = field(default_factory=dict)
    has_left: bool = False

    def __str__(self) -> str:
        if self.has_left:
            return f"has left (its engine was destroyed, or its program has ended) after {self.what}"
        if self.lacks:
            return f"waits for rank {' and '.join(self.lacks)} in {self.what} since {self.since}"
        return f"came to {self.what} at {self.since} and waits for nobody: it computes, or hangs outside of the engine"


class CollectiveChecks:
    """This rank's part in the comparison, for all groups of one engine.

    ``scope`` is a name that all of ``ranks`` have in common and that nobody used before. A wait of longer than ``timeout``
    is an error, whatever the others do.
    """

    def __init__(self, store: Store, scope: str, *, rank: int, ranks: Sequence[int], timeout: timedelta):
        self.store = store
        self.rank = rank
        self.timeout = timeout
        self._channels: weakref.WeakSet[Channel] = weakref.WeakSet()
        self._scope = scope
        self._ranks = tuple(ranks)
        # A program that ends, by an error or because its data did, is not to be waited for.
        atexit.register(self.close)

    def channel(self, name: str, members: Sequence[int]) -> Channel:
        """The operations of the group ``name``, of the global ranks ``members``."""
        channel = Channel(self, f"{self._scope}/{name}", members)
        self._channels.add(channel)
        return channel

    def close(self) -> None:
        """Say that this rank will do nothing more."""
        atexit.unregister(self.close)
        # The store may have ended before this program.
        with suppress(RuntimeError):
            self.store.set(self._departure_of(self.rank), "")

    def say(self, whereabouts: Whereabouts) -> None:
        """Write what this rank does."""
        self.store.set(_key_of(self.rank), json.dumps(asdict(whereabouts)))

    def of(self, rank: int) -> Whereabouts:
        """What ``rank`` has written that it does."""
        there = Whereabouts("nothing", "the start")
        if self.store.check([_key_of(rank)]):
            there = Whereabouts(**json.loads(self.store.get(_key_of(rank))))
        return Whereabouts(there.what, there.since, has_left=True) if self._has_left(rank) else there

    def fail(self, found: str) -> None:
        """Raise CollectiveError on every rank, with what was ``found`` first."""
        self.store.compare_set(f"{self._scope}/verdict", "", f"{found}. {REMEDY}")
        self.raise_verdict()

    def raise_verdict(self) -> None:
        """Raise CollectiveError where a rank has found something wrong."""
        verdict = f"{self._scope}/verdict"
        if not self.store.check([verdict]):
            return
        text = self.store.get(verdict).decode()
        self.store.set(f"{verdict}/read/{self.rank}", "")
        deadline, unread = time.monotonic() + LINGER_SECONDS, list(self._ranks)
        while unread and time.monotonic() < deadline:
            unread = [r for r in unread if not (self.store.check([f"{verdict}/read/{r}"]) or self._has_left(r))]
            time.sleep(LONGEST_PAUSE_SECONDS if unread else 0)
        raise CollectiveError(text)

    def begin_what_is_common(self) -> None:
        """Begin each of this rank's operations to which all ranks have come."""
        self.raise_verdict()
        for channel in self._channels:
            channel.begin_what_is_common()

    def stuck(self) -> dict[int, Whereabouts]:
        """All ranks on which this one depends, where none of them can go on; empty where one may.

        Looks twice: who waited then and waits now for a key that was not there in between has waited all the time, and
        so have all others.
        """
        found = self._depended_on()
        lacks = [list(there.lacks.values()) for there in found.values() if not there.has_left]
        if any(not keys or self.store.check(keys) for keys in lacks):
            return {}
        return found if self._depended_on() == found else {}

    def _depended_on(self) -> dict[int, Whereabouts]:
        found: dict[int, Whereabouts] = {}
        ahead = [self.rank]
        while ahead:
            rank = ahead.pop()
            if rank not in found:
                found[rank] = self.of(rank)
                ahead += map(int, found[rank].lacks)
        return found

    def _has_left(self, rank: int) -> bool:
        return bool(self.store.check([self._departure_of(rank)]))

    def _departure_of(self, rank: int) -> str:
        return f"{self._scope}/left/{rank}"


class Channel:
    """The operations of one group, in their order."""

    def __init__(self, checks: CollectiveChecks, name: str, members: Sequence[int]):
        self._checks = checks
        self._name = name
        self._members = tuple(members)
        self._announced = 0
        self._ahead: deque[Checked] = deque()

    def announce(self, collective: Collective, begin: Callable[[], Pending]) -> Checked:
        """Say that ``collective``, which ``begin`` starts, is this rank's next operation."""
        keys = {rank: f"{self._name}/{self._announced}/{rank}" for rank in self._members}
        self._announced += 1
        self._ahead.append(Checked(self._checks, Announced(self._checks, keys, str(collective)), begin))
        return self._ahead[-1]

    def begin_what_is_common(self) -> None:
        """Begin what all ranks have come to, in the order in which it was announced."""
        while self._ahead and self._ahead[0].announced.is_common():
            self._ahead.popleft().begin()


class Announced:
    """What this rank said that it is about to do. ``keys`` are those under which each rank says it."""

    def __init__(self, checks: CollectiveChecks, keys: Mapping[int, str], what: str):
        self.here = Whereabouts(what, time.strftime("%H:%M:%S"))
        self._checks = checks
        self._store = checks.store
        self._keys = keys
        self._store.set(keys[checks.rank], what)
        checks.say(self.here)

    def is_common(self) -> bool:
        """Whether all ranks have come to this operation. Raises CollectiveError where they came to another."""
        if not self._store.check(list(self._keys.values())):
            return False
        said: dict[str, list[int]] = {}
        for rank, key in self._keys.items():
            said.setdefault(self._store.get(key).decode(), []).append(rank)
        if len(said) > 1:
            differing = "; ".join(f"{_named(ranks)} at {what}" for what, ranks in said.items())
            self._checks.fail(f"ranks come to different operations: {differing}")
        return True

    def forget(self) -> None:
        """This rank has compared; the last one deletes the keys."""
        # First: whoever reads that this rank waits for a key looks whether it is there.
        self._checks.say(self.here)
        read = f"{self._keys[self._checks.rank].rpartition('/')[0]}/read"
        if self._store.add(read, 1) == len(self._keys):
            for key in (*self._keys.values(), read):
                self._store.delete_key(key)

    def lacking(self) -> dict[str, str]:
        """The keys of the ranks that have not come to this operation."""
        return {str(rank): key for rank, key in self._keys.items() if not self._store.check([key])}


class Checked:
    """An operation that ``begin`` starts while it, or another one, is waited for, once all ranks have come to it."""

    def __init__(self, checks: CollectiveChecks, announced: Announced, begin: Callable[[], Pending]):
        self.announced = announced
        self._checks = checks
        self._begin = begin
        self._begun: Pending | None = None

    def begin(self) -> None:
        """Start the operation."""
        self.announced.forget()
        self._begun = self._begin()

    def wait(self) -> None:
        """Return when the operation is complete. Where ranks do not come to it, every rank raises CollectiveError."""
        try:
            self._await_others()
        except dist.DistError as error:
            raise CollectiveError(
                f"the store of the process groups was lost in {self.announced.here.what}: the program that kept it, rank 0's "
                "as a rule, has ended, and its own error says why"
            ) from error
        assert self._begun is not None, "all ranks have come to the operation"
        self._begun.wait()

    def _await_others(self) -> None:
        started, pause, lacks = time.monotonic(), 0.0005, dict[str, str]()
        while self._begun is None:
            self._checks.begin_what_is_common()
            if self._begun is not None:
                break
            waited = time.monotonic() - started
            if waited > PATIENCE_SECONDS and not lacks:
                lacks = self.announced.lacking()
                self._checks.say(replace(self.announced.here, lacks=lacks))
            if lacks:
                self._look_around(waited)
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    def _look_around(self, waited: float) -> None:
        checks, here = self._checks, self.announced.here
        if stuck := checks.stuck():
            everyone = "; ".join(f"rank {rank} {there}" for rank, there in sorted(stuck.items()))
            checks.fail(f"ranks wait for each other in vain: {everyone}")
        if waited > checks.timeout.total_seconds():
            others = "; ".join(f"rank {rank} {checks.of(int(rank))}" for rank in self.announced.lacking())
            checks.fail(
                f"rank {checks.rank} has waited in {here.what} since {here.since}, for {waited:.0f} s: longer than the process "
                f"group's timeout. {others}"
            )


def _key_of(rank: int) -> str:
    """Of what a rank does, whichever engine it is in."""
    return f"collective_checks/{rank}"


def _named(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]} is" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))} are"
