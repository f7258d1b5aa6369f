"""The order in which units were needed before, as a hint for what is needed next."""

from __future__ import annotations

from collections.abc import Iterator

END = -1
"""Stands for the end of a backward: what comes after it is computed with other values."""

REMEMBERED = 2**16
"""Needs whose whole past is remembered; beyond, all are forgotten and learned again."""


class FetchOrder:
    """Remembers what followed all that was needed since the last end, and what followed each pair of units.

    A step that is like one before it is known to its end by the former. Otherwise two units tell forward from backward:
    after 3, 4 comes 5, and after 5, 4 comes 3. A changed control flow makes wrong guesses; nothing relies on a guess being
    right. The same needs give the same guesses on every rank.
    """

    def __init__(self) -> None:
        self._after_all: dict[int, int] = {}
        self._after_pair: dict[tuple[int, int], int] = {}
        self._all = 0
        self._pair = (END, END)

    def record(self, unit: int) -> int | None:
        """``unit`` is needed now (or a backward has ended: ``END``). Returns what was guessed, None where nothing was."""
        if unit == END and self._pair[1] == END:
            return None
        guess = self._after_all.get(self._all, self._after_pair.get(self._pair))
        if len(self._after_all) == REMEMBERED:
            self._after_all.clear()
        self._after_all[self._all] = self._after_pair[self._pair] = unit
        self._all = hash((self._all, unit)) if unit != END else 0
        self._pair = (self._pair[1], unit)
        return guess

    def upcoming(self) -> Iterator[int]:
        """The units that followed the last time, nearest first, up to the end of the backward."""
        everything, pair = self._all, self._pair
        guessed: set[tuple[int, int]] = set()
        while True:
            following = self._after_all.get(everything)
            if following is None:
                if pair in guessed:
                    return
                guessed.add(pair)
                following = self._after_pair.get(pair, END)
            if following == END:
                return
            yield following
            everything = hash((everything, following))
            pair = (pair[1], following)
