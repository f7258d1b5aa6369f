"""The order in which units were needed before, as a hint for what is needed next."""

from __future__ import annotations

from collections.abc import Iterator

END = -1
"""Stands for the end of a backward: what comes after it is computed with other values."""


class FetchOrder:
    """Remembers, for each pair of units that were needed one after the other, which one followed.

    Two units tell forward from backward: after 3, 4 comes 5, and after 5, 4 comes 3. A changed control flow makes a
    wrong guess once; nothing relies on a guess being right. The same needs give the same guesses on every rank.
    """

    def __init__(self) -> None:
        self._next: dict[tuple[int, int], int] = {}
        self._last = (END, END)

    def record(self, unit: int) -> None:
        """``unit`` is needed now (or a backward has ended: ``END``)."""
        if unit == END and self._last[1] == END:
            return
        self._next[self._last] = unit
        self._last = (self._last[1], unit)

    def upcoming(self) -> Iterator[int]:
        """The units that followed the last time, nearest first, up to the end of the backward. It may go in circles."""
        pair = self._last
        while True:
            following = self._next.get(pair, END)
            if following == END:
                return
            yield following
            pair = (pair[1], following)
