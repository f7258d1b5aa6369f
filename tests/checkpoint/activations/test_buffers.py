from __future__ import annotations

import pytest
import torch

from deepspeed.checkpoint.activations.buffers import InputBuffers, InputKind

FIRST = InputKind(0, torch.float32, torch.device("cpu"))


def address(buffers: InputBuffers, numel: int = 5, kind: InputKind = FIRST) -> int:
    row, give_back = buffers.lend(numel, kind)
    assert row.shape == (numel,) and row.dtype is kind.dtype
    give_back()
    return row.data_ptr()


def test_rows_of_a_kind_lie_end_to_end_and_come_back_in_any_order():
    buffers = InputBuffers(3)
    lent = [buffers.lend(5, FIRST) for _ in range(3)]
    addresses = [row.data_ptr() for row, _ in lent]
    assert addresses == [addresses[0] + 20 * index for index in range(3)]
    lent[1][1]()
    assert address(buffers) == addresses[1]


def test_kinds_have_buffers_of_their_own():
    buffers = InputBuffers(1)
    buffers.lend(5, FIRST)
    for kind in (InputKind(1, FIRST.dtype, FIRST.device), InputKind(0, torch.bfloat16, FIRST.device)):
        address(buffers, 7, kind)


def test_more_checkpoints_than_rows_are_an_error_that_names_the_key_and_reset():
    buffers = InputBuffers(2)
    lent = [buffers.lend(5, FIRST) for _ in range(2)]
    with pytest.raises(RuntimeError, match=r"all 2 rows for argument 0 .*: set number_checkpoints .*checkpointing\.reset\(\)"):
        buffers.lend(5, FIRST)
    lent[0][0].fill_(7)
    buffers.release()
    new, _ = buffers.lend(5, FIRST)
    new.zero_()
    assert lent[0][0].tolist() == [7] * 5, "what is lent stays valid"
    # Rows of before the release are not mixed with the new ones.
    lent[0][1]()
    assert buffers.lend(5, FIRST)[0].data_ptr() not in (new.data_ptr(), lent[0][0].data_ptr())


def test_another_size_is_an_error_while_a_row_is_lent_and_a_new_buffer_afterwards():
    buffers = InputBuffers(2)
    _, give_back = buffers.lend(5, FIRST)
    with pytest.raises(RuntimeError, match=r"argument 0 of a checkpoint has 8 elements to keep, and 5 in a checkpoint before"):
        buffers.lend(8, FIRST)
    give_back()
    address(buffers, 8)
