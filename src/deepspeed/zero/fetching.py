"""Which units are whole when: fetched when a module needs them, fetched ahead where the order is known, released behind.

A unit is *held* while a module that needs it runs forward, or while its part of backward runs. What is held is whole.
What nobody holds is released, unless it is expected again soon, or was fetched ahead for what is expected.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

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
    """Fetches and releases ``units``."""

    def __init__(self, units: Sequence[ParameterUnit], limits: FetchLimits):
        self.units = tuple(units)
        self.most_live_numel = 0
        self._limits = limits
        self._order = FetchOrder()

    @property
    def live_numel(self) -> int:
        """Elements of the units that have memory for all of them now."""
        return sum(unit.numel for unit in self.units if unit.state is not UnitState.SHARDED)

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
        for unit in wanted:
            unit.finish_fetch()

    def let_go(self, units: Iterable[ParameterUnit]) -> None:
        """Take back a ``hold``; what nobody holds any more is released, or set aside where it is expected."""
        for unit in units:
            unit.holds -= 1
            if not unit.holds:
                unit.set_aside() if self._is_expected(unit) else unit.release()

    def end_backward(self) -> None:
        """Release what nobody holds: its values are about to change."""
        self._record(END)
        self.release_idle()

    def release_idle(self) -> None:
        """Release all that nobody holds."""
        for unit in self.units:
            if not unit.holds:
                unit.release()

    def _record(self, index: int) -> None:
        guess = self._order.record(index)
        if self._limits.log_misses and guess not in (None, index):
            logger.warning("stage 3 expected %s to come next, and %s did", self._said(guess), self._said(index))

    def _said(self, index: int) -> str:
        return "the end of backward" if index == END else f"'{self.units[index].name}'"

    def _fetch_ahead(self) -> None:
        """Start to fetch what is expected next, and release what was fetched in vain."""
        live = [unit for unit in self.units if unit.state is not UnitState.SHARDED]
        ahead = self._expected(sum(unit.numel for unit in live))
        for unit in live:
            if not unit.holds and unit not in ahead and not self._is_expected(unit):
                unit.release()
        for unit in ahead:
            unit.start_fetch()
        self.most_live_numel = max(self.most_live_numel, self.live_numel)

    def _expected(self, live_numel: int) -> list[ParameterUnit]:
        """The units to have before they are needed, nearest first, as far as the limits allow."""
        ahead: list[ParameterUnit] = []
        ahead_numel = 0
        for index in self._order.upcoming():
            unit = self.units[index]
            ahead_numel += unit.numel
            if not self._limits.ahead or unit in ahead or (ahead and ahead_numel > self._limits.ahead):
                break
            if unit.state is UnitState.SHARDED:
                live_numel += unit.numel
                if live_numel > self._limits.live:
                    break
            ahead.append(unit)
        return ahead

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
