from __future__ import annotations

import pytest

from deepspeed.profiling import wall_clock
from deepspeed.profiling.wall_clock import ThroughputTimer, Timer, WallClockTimers


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(wall_clock, "time", made)
    return made


def test_a_timer_adds_its_intervals_in_milliseconds(clock: Clock) -> None:
    timer = Timer("forward")
    for seconds in (0.25, 0.5):
        timer.start()
        clock.now += seconds
        timer.stop()
        clock.now += 10
    assert timer.mean() == 375
    assert timer.elapsed(reset=False) == 750
    assert timer.elapsed() == 750
    assert timer.elapsed() == 0


def test_a_timer_started_twice_or_never_started_says_so() -> None:
    timer = Timer("step")
    with pytest.raises(RuntimeError, match="'step' was stopped without"):
        timer.stop()
    timer.start()
    with pytest.raises(RuntimeError, match="'step' was started twice"):
        timer.start()


def test_the_device_is_synchronized_at_both_ends_of_an_interval() -> None:
    calls: list[str] = []
    timers = WallClockTimers(synchronize=lambda: calls.append("wait"))
    with timers.timed("backward"):
        calls.append("work")
    assert calls == ["wait", "work", "wait"]


def test_the_log_line_names_what_was_recorded_in_the_order_asked_for(clock: Clock) -> None:
    timers = WallClockTimers()
    for name, seconds in (("backward", 0.04), ("forward", 0.02)):
        with timers.timed(name):
            clock.now += seconds
    names = ["forward", "backward", "step"]
    assert timers.line(names, normalizer=2, reset=False) == "time (ms) | forward: 10.00 | backward: 20.00"
    assert timers.line(names) == "time (ms) | forward: 20.00 | backward: 40.00"
    assert timers.line(names) == ""


def test_a_block_that_raises_is_not_recorded_and_can_be_timed_again(clock: Clock) -> None:
    timers = WallClockTimers()
    with pytest.raises(KeyError), timers.timed("forward"):
        raise KeyError
    with timers.timed("forward"):
        clock.now += 1
    assert timers.elapsed() == {"forward": 1000}


def test_throughput_counts_samples_of_the_steps_after_warm_up(clock: Clock) -> None:
    timer = ThroughputTimer(batch_size=8, start_step=1, tokens_per_sample=10)
    for seconds in (100.0, 2.0, 6.0):
        for end in (False, True):
            timer.start()
            clock.now += seconds / 2
            timer.stop(global_step=end)
    assert (timer.global_step_count, timer.micro_step_count) == (3, 6)
    assert timer.avg_samples_per_sec() == 2
    assert timer.samples_per_sec() == 8 / 6
    assert timer.tokens_per_sec() == 20


def test_throughput_is_zero_before_the_first_timed_step() -> None:
    timer = ThroughputTimer(batch_size=8)
    timer.stop(global_step=True)
    assert timer.avg_samples_per_sec() == timer.samples_per_sec() == 0
    with pytest.raises(ValueError, match="tokens_per_sample"):
        timer.tokens_per_sec()
