"""The hash of stored bytes, against the vectors of its specification, and without the compiled core."""

from __future__ import annotations

import pytest
import torch

from deepspeed.native import hashing
from deepspeed.native.hashing import BLOCK, EMPTY, Hash, hash_of


def with_numpy(monkeypatch) -> None:
    monkeypatch.setattr(hashing, "_load", lambda: (None, "switched off"))


def random_bytes(count: int) -> torch.Tensor:
    return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(count))


@pytest.mark.parametrize("core", [True, False])
def test_the_hash_of_a_block_is_xxh64(monkeypatch, core):
    """``hash_of`` hashes its blocks' hashes: here those of "", "a" and a longer text, as published."""
    if not core:
        with_numpy(monkeypatch)
    assert hash_of(torch.empty(0, dtype=torch.uint8)) == EMPTY
    for text, expected in ((b"a", 0xD24EC4F1A98C6E5B), (b"The quick brown fox jumps over the lazy dog", 0x0B242D361FDA71BC)):
        of_block = torch.tensor(list(expected.to_bytes(8, "little")), dtype=torch.uint8)
        found = Hash()
        found.update(torch.tensor(list(text), dtype=torch.uint8))
        assert bytes(found._hashes[0].view(torch.uint8).tolist()) == bytes(of_block.tolist())


@pytest.mark.parametrize("nbytes", [1, 3, 7, 8, 12, 31, 32, 39, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 45])
def test_numpy_and_the_core_agree_whatever_the_length(monkeypatch, nbytes):
    data = random_bytes(nbytes)
    expected = hash_of(data)
    with_numpy(monkeypatch)
    assert hash_of(data) == expected


def test_parts_have_the_hash_of_the_whole_and_any_change_another():
    data = random_bytes(3 * BLOCK + 45)
    parts = Hash()
    for part in data.split(2 * BLOCK):
        parts.update(part)
    assert parts.hexdigest() == hash_of(data)
    swapped = torch.cat([data[BLOCK : 2 * BLOCK], data[:BLOCK], data[2 * BLOCK :]])
    assert len({hash_of(data), hash_of(swapped), hash_of(data[:-1]), hash_of(data.roll(1))}) == 4


def test_a_hash_notices_each_bit():
    values = torch.randn(150, generator=torch.Generator().manual_seed(0))
    seen = {hash_of(values)}
    for index in range(150):
        values[index : index + 1].view(torch.int32).bitwise_xor_(1 << index % 32)
        seen.add(hash_of(values))
    assert len(seen) == 151
