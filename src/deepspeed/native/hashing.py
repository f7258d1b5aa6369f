"""The hash of stored bytes: XXH64 of the hashes (XXH64 too, 8 bytes each, little-endian) of their blocks of 64 KiB.

Blocks do not wait for each other. So the bytes may come in parts, and without the compiled core NumPy works on many blocks
at once. XXH64: https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md; it finds damage, not forgery.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .core import load as _load

BLOCK = 1 << 16
"""Bytes that are hashed by themselves."""

_PRIMES = (0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5)
_MASK = (1 << 64) - 1

Words = np.ndarray[Any, np.dtype[np.uint64]]


class Hash:
    """The hash of bytes that come in parts, each a multiple of ``BLOCK`` but for the last."""

    def __init__(self) -> None:
        self._hashes: list[Tensor] = []

    def update(self, data: Tensor) -> None:
        """Go on with ``data``, a contiguous CPU tensor."""
        nbytes = data.numel() * data.element_size()
        hashes = torch.empty(-(-nbytes // BLOCK), dtype=torch.int64)
        core = _load()[0]
        if core is not None:
            core.hash_blocks(data.data_ptr(), nbytes, BLOCK, hashes.data_ptr())
        elif nbytes:
            hashes.copy_(torch.from_numpy(_hash_blocks(data.reshape(-1).view(torch.uint8).numpy()).view(np.int64)))
        self._hashes.append(hashes)

    def hexdigest(self) -> str:
        """Sixteen hexadecimal digits."""
        joined = torch.cat(self._hashes) if self._hashes else torch.empty(0, dtype=torch.int64)
        core = _load()[0]
        if core is None:
            return f"{_hash_rows(joined.view(torch.uint8).numpy()[None])[0]:016x}"
        out = torch.empty(1, dtype=torch.int64)
        core.hash_blocks(joined.data_ptr(), joined.nbytes, max(joined.nbytes, 1), out.data_ptr())
        return f"{int(out) & _MASK:016x}" if joined.numel() else EMPTY


EMPTY = "ef46db3751d8e999"
"""XXH64 of nothing."""


def hash_of(data: Tensor) -> str:
    """The hash of the bytes of a contiguous CPU tensor."""
    found = Hash()
    found.update(data)
    return found.hexdigest()


def _hash_blocks(data: np.ndarray[Any, np.dtype[np.uint8]]) -> Words:
    whole = len(data) // BLOCK * BLOCK
    found = [_hash_rows(data[:whole].reshape(-1, BLOCK))] if whole else []
    if whole < len(data):
        found.append(_hash_rows(data[whole:][None]))
    return np.concatenate(found)


def _hash_rows(rows: np.ndarray[Any, np.dtype[np.uint8]]) -> Words:
    """XXH64 of each row of bytes."""
    first, second, third, fourth, fifth = (np.uint64(prime) for prime in _PRIMES)
    count, nbytes = rows.shape
    at = nbytes // 32 * 32
    with np.errstate(over="ignore"):
        if at:
            stripes = np.ascontiguousarray(rows[:, :at]).view(np.uint64).reshape(count, -1, 4)
            lanes = np.tile(np.array([first + second, second, 0, np.uint64(0) - first], np.uint64), (count, 1))
            for index in range(stripes.shape[1]):
                lanes = _rotated(lanes + stripes[:, index] * second, 31) * first
            hashes = sum((_rotated(lanes[:, lane], bits) for lane, bits in enumerate((1, 7, 12, 18))), np.uint64(0))
            for lane in range(4):
                hashes = (hashes ^ _rotated(lanes[:, lane] * second, 31) * first) * first + fourth
        else:
            hashes = np.full(count, fifth)
        hashes = hashes + np.uint64(nbytes)
        for start in range(at, nbytes - 7, 8):
            word = np.ascontiguousarray(rows[:, start : start + 8]).view(np.uint64)[:, 0]
            hashes = _rotated(hashes ^ _rotated(word * second, 31) * first, 27) * first + fourth
        at = nbytes // 8 * 8
        if nbytes - at >= 4:
            half = np.ascontiguousarray(rows[:, at : at + 4]).view(np.uint32)[:, 0].astype(np.uint64)
            hashes = _rotated(hashes ^ half * first, 23) * second + third
            at += 4
        for place in range(at, nbytes):
            hashes = _rotated(hashes ^ rows[:, place].astype(np.uint64) * fifth, 11) * first
        hashes = (hashes ^ hashes >> np.uint64(33)) * second
        hashes = (hashes ^ hashes >> np.uint64(29)) * third
        return hashes ^ hashes >> np.uint64(32)


def _rotated(words: Words, bits: int) -> Words:
    return words << np.uint64(bits) | words >> np.uint64(64 - bits)
