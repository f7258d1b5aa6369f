"""Which parameters have memory when, and what each limit does to it."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import deepspeed
from deepspeed.zero.fetching import UnitFetcher
from deepspeed.zero.units import UnitState
from tests.parity import Training, generator, make_engine

WIDTH = 16
WEIGHT = WIDTH * WIDTH
UNIT = WEIGHT + WIDTH
COUNT = 6


class Stack(nn.Module):
    """Blocks that are all alike: unit i is block i."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(COUNT)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = torch.tanh(block(x))
        return x


class Repeating(Stack):
    """Runs through all of its blocks twice."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(super().forward(x))


def squared_output(model: nn.Module, index: int, backward) -> None:
    backward(model(torch.randn(3, WIDTH, generator=generator(index))).square().mean())


TRAINING = Training(Stack, squared_output)


def engine_with(model: Callable[[], nn.Module] = Stack, **zero: object) -> deepspeed.DeepSpeedEngine:
    return make_engine(replace(TRAINING, make_model=model, config={"zero_optimization": zero}), 3)


def train(engine: deepspeed.DeepSpeedEngine, steps: int = 2) -> None:
    for index in range(steps):
        squared_output(engine, index, engine.backward)
        engine.step()


def fetcher_of(engine: deepspeed.DeepSpeedEngine) -> UnitFetcher:
    return engine.sharded_model.scopes.fetcher


def memory_of(engine: deepspeed.DeepSpeedEngine) -> list[str]:
    """The state of each unit, and whether its whole buffers have memory accordingly."""
    units = fetcher_of(engine).units
    for unit in units:
        nbytes = sum(part.whole.untyped_storage().nbytes() for part in unit.parts)
        assert nbytes == (0 if unit.state is UnitState.SHARDED else 4 * unit.numel)
    return [unit.state.name for unit in units]


def live_bytes() -> int:
    gc.collect()
    storages = [t.untyped_storage() for t in gc.get_objects() if issubclass(type(t), Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def live_at_each_point(threshold: int) -> tuple[int, list[int]]:
    """Bytes after initialize, and after forward, backward and step of the third step without prefetching."""
    before = live_bytes()
    engine = engine_with(stage3_param_persistence_threshold=threshold, stage3_prefetch_bucket_size=0)
    initial = live_bytes() - before
    train(engine)
    x = torch.randn(3, WIDTH)
    before += x.nbytes
    with torch.no_grad():
        engine(x)
    # The last unit of forward is expected to be the first of backward.
    assert memory_of(engine) == ["SHARDED"] * (COUNT - 1) + ["FETCHED"]
    loss = engine(x).square().mean()
    assert memory_of(engine)[:-1] == ["SHARDED"] * (COUNT - 1)
    engine.backward(loss)
    assert memory_of(engine) == ["SHARDED"] * COUNT
    del loss
    differentiated = live_bytes() - before
    engine.step()
    stepped = live_bytes() - before
    with torch.no_grad():
        engine(x)
    engine.empty_partition_cache()
    return initial, [differentiated, stepped, live_bytes() - before]


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(("threshold", "sharded"), [(0, UNIT), (WIDTH, WEIGHT)])
def test_what_lives_is_the_own_slices_and_small_parameters(ranks, size, threshold, sharded):
    slices, resident = 4 * COUNT * sharded // size, 4 * COUNT * (UNIT - sharded)
    momentum = gradients = slices + resident // size
    padding = 4 * COUNT * 32
    for initial, later in ranks(size, live_at_each_point, threshold):
        assert 0 <= initial - (slices + resident) <= padding
        for found in later:
            assert 0 <= found - (slices + resident + momentum + gradients) <= 3 * padding


def most_live(zero: dict[str, object]) -> int:
    engine = engine_with(**zero)
    train(engine, 3)
    return fetcher_of(engine).most_live_numel // WEIGHT


@pytest.mark.parametrize(
    ("zero", "units"),
    [
        ({"stage3_prefetch_bucket_size": 0}, 1),
        ({"stage3_prefetch_bucket_size": 1}, 2),
        ({"stage3_prefetch_bucket_size": 2 * WEIGHT}, 3),
        ({"stage3_prefetch_bucket_size": 100 * WEIGHT}, COUNT),
        ({"stage3_prefetch_bucket_size": 100 * WEIGHT, "stage3_max_live_parameters": 4 * WEIGHT}, 4),
        ({"stage3_max_reuse_distance": 100 * WEIGHT, "stage3_prefetch_bucket_size": 0}, COUNT),
        (
            {
                "stage3_max_reuse_distance": 100 * WEIGHT,
                "stage3_prefetch_bucket_size": 0,
                "stage3_max_live_parameters": 3 * WEIGHT,
            },
            3,
        ),
    ],
)
def test_limits_bound_what_is_whole_at_once(ranks, zero, units):
    """In units: one in use, and what may be fetched ahead or kept for reuse."""
    zero = {"stage3_param_persistence_threshold": WIDTH, **zero}
    assert ranks(2, most_live, zero) == [units] * 2


def fetches(zero: dict[str, object], model: type[nn.Module]) -> tuple[int, int]:
    """Gathers of units in the forward and in the backward of the third step."""
    engine = engine_with(model, stage3_param_persistence_threshold=WIDTH, **zero)
    train(engine)
    log = engine.communicator.log
    log.clear()
    loss = engine(torch.randn(3, WIDTH)).square().mean()
    forward = log.total("all_gather").count
    engine.backward(loss)
    compared = 1  # what is frozen, before the backward
    return forward, log.total("all_gather").count - forward - compared


@pytest.mark.parametrize(
    ("zero", "model", "expected"),
    [
        ({}, Stack, (COUNT, COUNT - 1)),
        ({"stage3_prefetch_bucket_size": 0}, Stack, (COUNT, COUNT - 1)),
        ({"stage3_max_reuse_distance": 2 * WEIGHT}, Stack, (COUNT, COUNT - 3)),
        ({"stage3_max_reuse_distance": 100 * WEIGHT}, Stack, (COUNT, 0)),
        ({}, Repeating, (COUNT, COUNT - 1)),
        ({"stage3_prefetch_bucket_size": 0}, Repeating, (2 * COUNT, 2 * COUNT - 1)),
        ({"stage3_max_reuse_distance": 100 * WEIGHT}, Repeating, (COUNT, 0)),
        ({"leaf_module": {"names": [""]}}, Stack, (1, 0)),
        ({"leaf_module": {"classes": ["Stack"]}}, Stack, (1, 0)),
        ({"leaf_module": {"classes": ["Repeating"]}}, Repeating, (1, 0)),
    ],
)
def test_a_unit_is_fetched_once_for_each_time_it_is_needed(ranks, zero, model, expected):
    """The last unit of forward is the first of backward; more is kept where the reuse distance allows, or where it would be
    fetched ahead at once."""
    assert ranks(2, fetches, zero, model) == [expected] * 2


def residents(zero: dict[str, object]) -> int:
    engine = engine_with(**zero)
    return sum(p.numel() for p in engine.module.parameters())


@pytest.mark.parametrize(
    ("zero", "numel"),
    [
        ({"stage3_param_persistence_threshold": 0}, 0),
        ({"stage3_param_persistence_threshold": WIDTH}, COUNT * WIDTH),
        ({"stage3_param_persistence_threshold": WEIGHT}, COUNT * UNIT),
        ({"stage3_param_persistence_threshold": WIDTH, "stage3_model_persistence_threshold": 3 * WIDTH}, 3 * WIDTH),
    ],
)
def test_small_parameters_stay_whole_up_to_their_limits(ranks, zero, numel):
    assert ranks(2, residents, zero) == [numel] * 2


def cut(zero: dict[str, object]) -> list[str]:
    model = partial(nn.Sequential, Stack(), Stack())
    return [unit.name for unit in fetcher_of(engine_with(model, **zero)).units]


def test_a_block_of_more_than_may_be_live_is_cut_into_the_blocks_inside(ranks):
    limit = {"stage3_param_persistence_threshold": 0}
    assert ranks(2, cut, limit) == [["0", "1"]] * 2
    limit["stage3_max_live_parameters"] = 3 * UNIT
    assert ranks(2, cut, limit) == [[f"{half}.blocks.{i}" for half in range(2) for i in range(COUNT)]] * 2


def sent(accumulation: int, threshold: int) -> tuple[int, int, float, float]:
    """Elements in units and residents, and elements that this rank sent per step to reduce and to gather them."""
    zero = {"stage3_param_persistence_threshold": threshold}
    training = replace(TRAINING, accumulation=accumulation, config={"zero_optimization": zero})
    engine = make_engine(training, 3)
    train(engine, accumulation)
    log = engine.communicator.log
    log.clear()
    train(engine, 2 * accumulation)
    layout = engine.optimizer.flat.layout
    in_units = sum(bucket.numel for bucket in layout.buckets if bucket.unit is not None)
    # The agreement on norms and flags is gathered too.
    sizes = {4 * bucket.numel for bucket in layout.buckets}
    reduced, gathered = (
        sum(tally.wire_nbytes for (kind, message), tally in log.tallies.items() if kind == wanted and message in sizes)
        for wanted in ("reduce_scatter", "all_gather")
    )
    return in_units, sum(bucket.numel for bucket in layout.buckets) - in_units, reduced / 8, gathered / 8


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(("accumulation", "threshold"), [(1, 0), (4, 0), (2, WIDTH)])
def test_each_micro_step_gathers_twice_and_reduces_once(ranks, size, accumulation, threshold):
    """Units: 3 P (N - 1) / N per micro-step, less the one unit with which backward begins. Residents: reduced in each
    micro-step and gathered after the step."""
    for units, resident, reduced, gathered in ranks(size, sent, accumulation, threshold):
        share = (size - 1) / size
        assert reduced == accumulation * (units + resident) * share
        assert gathered == (accumulation * (2 * units - units // COUNT) + resident) * share


def misses(log: bool) -> list[str]:
    engine = engine_with(stage3_param_persistence_threshold=WIDTH, log_trace_cache_warnings=log)
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logging.getLogger("DeepSpeed").addHandler(handler)
    train(engine)
    assert records == []
    engine.module.blocks[3](torch.ones(WIDTH))
    logging.getLogger("DeepSpeed").removeHandler(handler)
    return records


def test_wrong_guesses_are_logged_where_the_configuration_says_so(ranks):
    assert ranks(2, misses, True) == [["stage 3 expected 'blocks.0' to come next, and 'blocks.3' did"]] * 2
    assert ranks(2, misses, False) == [[]] * 2
