from __future__ import annotations

import torch

from deepspeed.memory.pool import BufferPool


def make_pool(numel: int) -> BufferPool:
    return BufferPool(numel, dtype=torch.float32, device=torch.device("cpu"))


def test_a_buffer_that_came_back_is_lent_again_at_any_size_that_fits() -> None:
    pool = make_pool(100)
    first = pool.take(60)
    assert first.shape == (60,)
    address = first.data_ptr()
    pool.give_back(first)
    second = pool.take(100)
    assert second.shape == (100,)
    assert second.data_ptr() == address
    assert pool.take(10).data_ptr() != address


def test_a_larger_buffer_is_not_kept() -> None:
    pool = make_pool(100)
    large = pool.take(1000)
    assert large.shape == (1000,)
    pool.give_back(large)
    assert pool.take(100).untyped_storage().nbytes() == 400


def test_a_released_pool_lends_new_buffers() -> None:
    pool = make_pool(100)
    kept = pool.take(100)
    pool.give_back(kept)
    pool.release()
    assert pool.take(100).data_ptr() != kept.data_ptr()
