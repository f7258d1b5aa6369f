from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

import deepspeed
from deepspeed.logs import logger
from tests.engine.test_engine import batch, make_engine, make_model, train


@contextmanager
def logged() -> Iterator[list[str]]:
    """What the package logs within the context, but for the announcement at the start."""
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logger.addHandler(handler)
    try:
        yield records
    finally:
        logger.removeHandler(handler)
        records[:] = [record for record in records if "DeepSpeed info" not in record]


def trained(steps: int, config: dict[str, object]) -> list[str]:
    with logged() as records:
        engine = make_engine(2, **config)
        train(engine, 0, steps * engine.gradient_accumulation_steps())
        engine.destroy()
    return records


@pytest.mark.parametrize("every", [None, 0, float("inf")])
def test_nothing_is_logged_unless_asked_for(ranks, every):
    assert ranks(2, trained, 3, {"steps_per_print": every}) == [[], []]


def test_progress_is_logged_by_the_first_rank_at_every_reported_step(ranks):
    first, second = ranks(2, trained, 4, {"steps_per_print": 2})
    assert second == []
    assert len(first) == 2
    number = r"-?\d+\.\d+"
    wanted = rf"step=2, skipped=0, lr=\[0\.1\], loss={number}, grad_norm={number}"
    assert re.fullmatch(wanted, first[0])
    assert re.fullmatch(rf"step=4.*, samples/s={number}", first[1])


PARTS = ["forward", "backward", "reduce", "step"]


@pytest.mark.parametrize(("every", "lines"), [(None, 4), (float("inf"), 4), (2, 2)])
def test_the_wall_clock_breakdown_says_the_milliseconds_of_each_part_of_a_step(ranks, every, lines):
    config = {"steps_per_print": every, "wall_clock_breakdown": True, "gradient_accumulation_steps": 2}
    first, second = ranks(2, trained, 4, config)
    times = [line for line in first if line.startswith("time (ms)")]
    assert second == [] and len(times) == lines
    for line in times:
        parts = dict(part.split(": ") for part in line.split(" | ")[1:])
        assert list(parts) == PARTS
        assert all(float(milliseconds) >= 0 for milliseconds in parts.values())


def timers_of_evaluation() -> tuple[int, int]:
    engine = make_engine(1, wall_clock_breakdown=True, steps_per_print=1000)
    train(engine, 0, 3)
    with torch.no_grad():
        engine(batch(0))
    return engine.timers("forward").count, engine.tput_timer.global_step_count


def test_evaluation_does_not_count_in_the_times_of_a_step(ranks):
    assert ranks(1, timers_of_evaluation) == [(3, 3)]


def throughput(enabled: bool) -> tuple[int, bool]:
    engine = make_engine(1, timers={"throughput": {"enabled": enabled}}, gradient_accumulation_steps=2)
    train(engine, 0, 8)
    return engine.tput_timer.global_step_count, engine.tput_timer.avg_samples_per_sec() > 0


def test_the_throughput_timer_counts_optimizer_steps_unless_switched_off(ranks):
    assert ranks(1, throughput, True) == [(4, True)]
    assert ranks(1, throughput, False) == [(0, False)]


def test_memory_is_logged_at_every_reported_step(ranks):
    first, _ = ranks(2, trained, 2, {"memory_breakdown": True})
    assert len(first) == 2
    assert all(re.match(r"memory \| \w+(:\d)? \d+\.\d\d GB, peak \d+\.\d\d GB \| process", line) for line in first)


def test_the_communication_log_is_written_at_the_end_and_in_between_if_verbose(ranks):
    quiet, other = ranks(2, trained, 3, {"comms_logger": {"enabled": True}})
    assert other == [] and len(quiet) == 1
    assert "reduce_scatter" in quiet[0] and "all_gather" in quiet[0] and "GB/s" in quiet[0]
    chosen = {"enabled": True, "verbose": True, "prof_all": False, "prof_ops": ["all_gather"]}
    verbose, _ = ranks(2, trained, 3, {"comms_logger": chosen})
    assert len(verbose) == 4
    assert all("all_gather" in text and "reduce_scatter" not in text for text in verbose)


def profiled(path: str) -> tuple[int, int]:
    options = {"enabled": True, "profile_step": 1, "module_depth": 1, "top_modules": 2, "output_file": path}
    engine = make_engine(2, flops_profiler=options, gradient_accumulation_steps=2)
    train(engine, 0, 6)
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in engine.module.modules())
    return engine.global_steps, hooks


def test_the_flops_profiler_profiles_one_step_and_leaves(ranks, tmp_path):
    file = tmp_path / "profile.txt"
    assert ranks(2, profiled, str(file)) == [(3, 0)] * 2
    text = file.read_text()
    assert "world size:" in text and "batch size per GPU:" in text
    macs = 2 * 4 * (16 * 33 + 33 * 16)
    assert f"{macs / 1e3:.2f} KMACs" in text
    assert "(0): Linear" in text


def with_profile_of_a_broken_step() -> int:
    engine = make_engine(2, flops_profiler={"enabled": True, "profile_step": 0})
    engine(batch(0))
    engine.destroy()
    return sum(len(module._forward_hooks) for module in engine.module.modules())


def test_a_profiler_that_is_under_way_is_taken_off_by_destroy(ranks):
    assert ranks(1, with_profile_of_a_broken_step) == [0]


def compiled(config: dict[str, object]) -> tuple[bool, dict[str, torch.Tensor]]:
    engine = make_engine(1, **config)
    if not config:
        assert not engine.is_compiled
        engine.compile(backend="eager", compile_kwargs={"dynamic": False})
    train(engine, 0, 2)
    return engine.is_compiled, {name: value.detach().clone() for name, value in engine.module.state_dict().items()}


@pytest.mark.parametrize("config", [{}, {"compile": {"enabled": True, "backend": "eager", "kwargs": {"dynamic": False}}}])
def test_a_compiled_engine_trains_to_the_same_numbers(ranks, config):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for index in range(2):
        model(batch(index)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    ((is_compiled, weights),) = ranks(1, compiled, config)
    assert is_compiled
    for name, value in model.state_dict().items():
        torch.testing.assert_close(weights[name], value, rtol=1e-6, atol=1e-7)


def memory_said(force: bool) -> list[str]:
    with logged() as records:
        deepspeed.runtime.utils.see_memory_usage("after the model", force=force)
    return records


def test_memory_usage_is_said_by_the_first_rank_when_forced(ranks):
    first, second = ranks(2, memory_said, True)
    assert len(first) == 1 and first[0].startswith("[Rank 0] after the model | ") and second == []
    assert ranks(1, memory_said, False) == [[]]
