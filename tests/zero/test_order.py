from __future__ import annotations

from itertools import islice

from deepspeed.zero.order import END, FetchOrder

STEP = [0, 1, 2, 2, 1, 0, END]


def recorded(*units: int) -> FetchOrder:
    order = FetchOrder()
    for unit in units:
        order.record(unit)
    return order


def test_nothing_is_known_at_first():
    assert list(recorded().upcoming()) == []
    assert list(recorded(0, 1).upcoming()) == []


def test_forward_and_backward_are_told_apart():
    assert list(recorded(*STEP, 0, 1).upcoming()) == [2, 2, 1, 0]
    assert list(recorded(*STEP, *STEP[:5]).upcoming()) == [0]


def test_nothing_is_expected_beyond_the_end_of_a_backward():
    assert list(recorded(*STEP, *STEP[:6]).upcoming()) == []
    assert list(islice(recorded(*STEP, *STEP).upcoming(), 3)) == [0, 1, 2]


def test_a_changed_order_is_learned():
    other = [0, 3, 3, 0, END]
    assert list(recorded(*STEP, *other, *other, 0).upcoming()) == [3, 3, 0]


def test_an_end_that_is_said_twice_is_one():
    assert list(recorded(*STEP, END, 0, 1).upcoming()) == [2, 2, 1, 0]


def test_a_step_that_goes_through_its_units_twice_is_known_to_its_end():
    step = [0, 1, 2, 0, 1, 2, 2, 1, 0, 2, 1, 0, END]
    for known in range(len(step) - 1):
        assert list(recorded(*step, *step[:known]).upcoming()) == step[known:-1]


def test_guesses_for_what_never_was_end():
    order = recorded(*[0, 1] * 50)
    assert list(order.upcoming()) == [0, 1]
