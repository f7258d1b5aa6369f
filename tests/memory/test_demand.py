from __future__ import annotations

from dataclasses import replace

import pytest

from deepspeed.memory.demand import Arrival, Rates, StepSettings, Trace, demand, step_time
from deepspeed.memory.layout import FlatLayout, ParameterSpec

NUMEL = 1 << 16
NAMES = ["first", "second", "third"]


def layout(dtype: str = "float32", *, ranks: int = 1, units: bool = False) -> FlatLayout:
    """Three parameters, a bucket each; with ``units``, one each of them too."""
    specs = [ParameterSpec(name, (NUMEL,), dtype, unit=index if units else None) for index, name in enumerate(NAMES)]
    return FlatLayout.build(specs, shards=ranks, bucket_numel=NUMEL)


def trace(*live: int) -> Trace:
    """A backward whose gradients arrive in the order of buckets."""
    return Trace(tuple(Arrival(name, bytes_) for name, bytes_ in zip(reversed(NAMES), live, strict=True)), flops=1000)


QUIET = trace(0, 0, 0)


@pytest.mark.parametrize(("stage", "per_parameter"), [(0, 16), (1, 4 + 12 / 4), (2, 2 + 14 / 4)])
def test_the_states_are_those_of_the_stage(stage: int, per_parameter: float) -> None:
    settings = StepSettings(stage, ranks=4, constructs=False, copies=False)
    needs = demand(layout("bfloat16", ranks=4 if stage else 1), QUIET, settings, base=0)
    assert needs.states.total == 3 * NUMEL * per_parameter and needs.disk.total == 0


def test_what_lies_on_the_disk_is_not_in_memory() -> None:
    settings = StepSettings(3, parameters_on_disk=True, states_on_disk=True, fetch_ahead=1)
    needs = demand(layout(units=True), QUIET, settings, base=0)
    assert needs.states.total == 0 and needs.disk.total == 3 * NUMEL * 16
    assert needs.units == 2 * NUMEL * 4  # one, and the next
    assert needs.stepping == 3 * NUMEL * 16  # read, stepped and written


def test_the_peak_is_the_worst_moment_and_not_the_sum_of_the_worst() -> None:
    settings = StepSettings(2, constructs=False)
    early, late = (demand(layout(), trace(*live), settings, base=0) for live in ((1 << 30, 0, 0), (0, 0, 1 << 30)))
    assert early.live == late.live == 1 << 30
    assert early.reducing == 0  # activations are the most before a gradient has landed
    assert late.reducing == 2 * NUMEL * 4
    assert early.peak == early.states.total + (1 << 30)


def test_constructing_the_model_may_be_the_most() -> None:
    settings = StepSettings(2, ranks=64, copies=False)
    needs = demand(layout("bfloat16", ranks=64), QUIET, settings, base=1000)
    assert needs.peak == 1000 + needs.construction > 1000 + 3 * NUMEL * 4


def test_the_step_takes_as_long_as_the_slower_of_disk_and_processor() -> None:
    settings = StepSettings(3, parameters_on_disk=True, states_on_disk=True)
    needs = demand(layout(units=True), QUIET, settings, base=0)
    rates = Rates(multiply=1e3, memory=1e9, read=1e6, write=2e6)
    time = step_time(needs, QUIET, rates, settings)
    assert time.computing == 1 and time.communication == 0
    assert time.computing_disk == pytest.approx(3 * NUMEL * (2 * 4 / 1e6 + 4 / 2e6))
    assert time.optimizer_disk == pytest.approx(3 * NUMEL * (16 / 1e6 + 12 / 2e6))
    assert time.total == pytest.approx(max(1, time.computing_disk) + time.optimizer_disk)


def test_communication_is_counted_where_its_rate_is_known() -> None:
    settings = StepSettings(3, ranks=4)
    needs = demand(layout(ranks=4, units=True), QUIET, settings, base=0)
    rates = Rates(multiply=1e3, memory=1e9, read=1, write=1)
    assert step_time(needs, QUIET, rates, settings).communication == 0
    known = step_time(needs, QUIET, replace(rates, network=1e6), settings)
    assert known.communication == pytest.approx(3 * (3 * NUMEL * 4) * 3 / 4 / 1e6)
