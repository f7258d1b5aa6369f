"""Which units are whole when: fetched when a module needs them, fetched ahead where the order is known, released behind.

A unit is *held* while a module that needs it runs forward, or while its part of backward runs. What is held is whole.
What nobody holds is released, unless it is expected again soon, or was fetched ahead for what is expected.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from .arriving import Hops
from .order import END, FetchOrder
from .units import ParameterUnit, UnitState

logger = logging.getLogger("DeepSpeed")


@dataclass(frozen=True)
class FetchLimits:
    """In elements. ``ahead``: units that are fetched before they are needed, in all (one at least, unless 0).
    ``reuse``: a unit that is needed again before others of more than so many are is kept. ``live``: what nobody holds makes
    room where more than so many would be whole at once. ``log_misses``: warn of guesses that were wrong."""

    ahead: int
    reuse: int
    live: int
    log_misses: bool = False


class UnitFetcher:
    """Fetches and releases ``units``, whose ``hops`` go on whenever one is needed or let go."""

    def __init__(self, units: Sequence[ParameterUnit], limits: FetchLimits, hops: Hops | None = None):
        self.units = tuple(units)
        self.live_numel = sum(unit.numel for unit in units if unit.state is not UnitState.SHARDED)
        """Elements of the units that have memory for all of them now."""
        self.most_live_numel = 0
        self._limits = limits
        self._hops = hops or Hops()
        self._order = FetchOrder()
        # Those to have before they are needed, nearest first, and what is to join them: good as long as guesses are right
        # and nobody releases one of them.
        self._ahead: dict[ParameterUnit, None] = {}
        self._ahead_numel = 0
        self._beyond: Iterator[ParameterUnit] = iter(())
        self._next: ParameterUnit | None = None
        self._ahead_holds = False
        for unit in units:
            unit.on_memory = self._on_memory

    def hold(self, units: Iterable[ParameterUnit]) -> None:
        """Make ``units`` whole until ``let_go``, and start to fetch what is expected next."""
        wanted = []
        for unit in units:
            unit.holds += 1
            if unit.holds == 1:
                wanted.append(unit)
                self._record(unit.index)
                self._make_room(unit)
                unit.start_fetch()
        if wanted:
            self._fetch_ahead()
            self._hops.advance()
        for unit in wanted:
            unit.finish_fetch()

    def let_go(self, units: Iterable[ParameterUnit]) -> None:
        """Take back a ``hold``; what nobody holds any more is released, or set aside where it is expected or would be fetched
        ahead again."""
        self._hops.advance()
        for unit in units:
            unit.holds -= 1
            if not unit.holds:
                unit.set_aside() if unit in self._ahead or self._is_expected(unit) else unit.release()

    def end_backward(self) -> None:
        """Release what nobody holds: its values are about to change."""
        self._record(END)
        self.release_idle()

    def release_idle(self) -> None:
        """Release all that nobody holds."""
        for unit in self.units:
            if not unit.holds:
                unit.release()

    def _on_memory(self, unit: ParameterUnit, change: int) -> None:
        """``unit`` was given memory for so many elements, or lost it."""
        self.live_numel += change
        if change < 0 and unit in self._ahead:
            self._ahead_holds = False

    def _record(self, index: int) -> None:
        guess = self._order.record(index)
        first = next(iter(self._ahead), None)
        if guess == index and first is not None and first.index == index:
            del self._ahead[first]
            self._ahead_numel -= first.numel
        else:
            self._ahead_holds = False
        if self._limits.log_misses and guess not in (None, index):
            logger.warning("stage 3 expected %s to come next, and %s did", self._said(guess), self._said(index))

    def _said(self, index: int) -> str:
        return "the end of backward" if index == END else f"'{self.units[index].name}'"

    def _fetch_ahead(self) -> None:
        """Start to fetch what is expected next. Where that is what was expected before, there is only more of it at the far
        end; else begin anew, and release what was fetched in vain."""
        if self._ahead_holds:
            joining = self._extend_ahead()
        else:
            self._ahead, self._ahead_numel, self._ahead_holds = {}, 0, True
            self._beyond = (self.units[index] for index in self._order.upcoming())
            self._next = next(self._beyond, None)
            joining = self._extend_ahead()
            idle = (unit for unit in self.units if unit.state is not UnitState.SHARDED and not unit.holds)
            for unit in idle:
                if unit not in self._ahead and not self._is_expected(unit):
                    unit.release()
        for unit in joining:
            unit.start_fetch()
        self.most_live_numel = max(self.most_live_numel, self.live_numel)

    def _extend_ahead(self) -> list[ParameterUnit]:
        """Let units join those to have before they are needed, as far as the limits allow."""
        joining, live_numel = [], self.live_numel
        while (unit := self._next) is not None and self._limits.ahead and unit not in self._ahead:
            if self._ahead and self._ahead_numel + unit.numel > self._limits.ahead:
                break
            if unit.state is UnitState.SHARDED:
                live_numel += unit.numel
                if live_numel > self._limits.live:
                    break
            self._ahead[unit] = None
            self._ahead_numel += unit.numel
            self._next = next(self._beyond, None)
            joining.append(unit)
        return joining

    def _make_room(self, wanted: ParameterUnit) -> None:
        """Release what nobody holds and is needed last, until ``wanted`` has room among what may be live."""
        missing = self.live_numel + wanted.numel - self._limits.live
        if wanted.state is not UnitState.SHARDED or missing <= 0:
            return
        expected = list(dict.fromkeys(self._order.upcoming()))
        idle = [unit for unit in self.units if unit.state is not UnitState.SHARDED and not unit.holds]
        nearest = {index: place for place, index in enumerate(expected)}
        for unit in sorted(idle, key=lambda unit: nearest.get(unit.index, len(expected)), reverse=True):
            if missing > 0:
                missing -= unit.numel
                unit.release()

    def _is_expected(self, unit: ParameterUnit) -> bool:
        """Whether ``unit`` is needed again before others of more than ``reuse`` elements are."""
        between, others = 0, set()
        for index in self._order.upcoming():
            if index == unit.index:
                return True
            if index not in others:
                others.add(index)
                between += self.units[index].numel
            if between > self._limits.reuse:
                return False
        return False
