from __future__ import annotations

import pytest

from deepspeed.optim import DynamicLossScaler, NoLossScaler, StaticLossScaler


def scales(scaler: DynamicLossScaler, overflows: list[int]) -> list[float]:
    seen = []
    for overflow in overflows:
        scaler.update(bool(overflow))
        seen.append(scaler.scale)
    return seen


def test_the_scale_halves_at_overflow_and_doubles_after_the_window():
    scaler = DynamicLossScaler(initial_scale_power=4, loss_scale_window=2, hysteresis=1)
    assert scales(scaler, [1, 0, 0, 0, 0, 1]) == [8, 8, 16, 16, 32, 16]


def test_hysteresis_tolerates_overflows():
    assert scales(DynamicLossScaler(initial_scale_power=4, hysteresis=2), [1, 0, 1, 1]) == [16, 16, 8, 4]


def test_consecutive_hysteresis_refills_at_each_good_step():
    scaler = DynamicLossScaler(initial_scale_power=4, hysteresis=2, consecutive_hysteresis=True)
    assert scales(scaler, [1, 0, 1, 0, 1, 1]) == [16, 16, 16, 16, 16, 8]


def test_overflow_at_the_minimum_is_an_error_that_names_it():
    scaler = DynamicLossScaler(initial_scale_power=1, hysteresis=1, min_loss_scale=1.0)
    scaler.update(True)
    with pytest.raises(OverflowError, match="minimum of 1"):
        scaler.update(True)


def test_a_scaler_resumes_exactly():
    first = DynamicLossScaler(initial_scale_power=4, loss_scale_window=3, hysteresis=2)
    scales(first, [1, 0, 0])
    second = DynamicLossScaler(initial_scale_power=9, loss_scale_window=3, hysteresis=2)
    second.load_state_dict(first.state_dict())
    assert scales(second, [0, 1, 1, 1]) == scales(first, [0, 1, 1, 1])


def test_a_constant_scale_does_not_adapt():
    for scaler, expected in ((StaticLossScaler(128), 128), (NoLossScaler(), 1)):
        scaler.update(True)
        assert scaler.scale == expected
