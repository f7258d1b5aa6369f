from __future__ import annotations

import torch
from torch import Tensor

from deepspeed.memory.pool import BufferPool


def take(pool: BufferPool, numel: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return pool.take(numel, dtype=dtype, device=torch.device("cpu"))


def test_a_buffer_that_came_back_is_lent_again_at_any_size_that_fits() -> None:
    pool = BufferPool()
    first = take(pool, 100)
    address = first.data_ptr()
    pool.give_back(first)
    second = take(pool, 60)
    assert second.shape == (60,)
    assert second.data_ptr() == address
    assert take(pool, 10).data_ptr() != address
    pool.give_back(second)
    assert take(pool, 100).data_ptr() == address


def test_the_smallest_buffer_that_fits_is_lent() -> None:
    pool = BufferPool()
    buffers = [take(pool, numel) for numel in (1000, 100, 10)]
    for buffer in buffers:
        pool.give_back(buffer)
    assert take(pool, 50).data_ptr() == buffers[1].data_ptr()


def test_a_buffer_that_is_too_small_makes_way_for_a_larger_one() -> None:
    pool = BufferPool()
    small = take(pool, 100)
    pool.give_back(small)
    large = take(pool, 1000)
    assert large.untyped_storage().nbytes() == 4000
    pool.give_back(large)
    assert take(pool, 100).data_ptr() == large.data_ptr()
    assert take(pool, 100).untyped_storage().nbytes() == 400


def test_dtypes_do_not_share_buffers() -> None:
    pool = BufferPool()
    wide = take(pool, 100)
    pool.give_back(wide)
    assert take(pool, 100, torch.bfloat16).dtype == torch.bfloat16
    assert take(pool, 100).data_ptr() == wide.data_ptr()


def test_a_released_pool_lends_new_buffers() -> None:
    pool = BufferPool()
    kept = take(pool, 100)
    pool.give_back(kept)
    pool.release()
    assert take(pool, 100).data_ptr() != kept.data_ptr()
