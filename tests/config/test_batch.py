from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepspeed.config import ConfigError, load_config
from deepspeed.config.batch import BATCH_KEYS, BatchSizes, solve_batch_sizes

SIZE = st.integers(1, 10_000)
TRAIN, MICRO, STEPS = BATCH_KEYS


def holds(sizes: object, ranks: int) -> bool:
    return isinstance(sizes, BatchSizes) and sizes.train == sizes.micro * sizes.accumulation * ranks


@given(micro=SIZE, steps=SIZE, ranks=SIZE, known=st.sets(st.sampled_from(BATCH_KEYS), min_size=2))
def test_any_two_of_the_three_give_the_third(micro, steps, ranks, known):
    whole = {TRAIN: micro * steps * ranks, MICRO: micro, STEPS: steps}
    sizes = solve_batch_sizes({key: whole[key] for key in known}, world_size=ranks)
    assert sizes == BatchSizes(whole[TRAIN], micro, steps)


@given(sizes=st.dictionaries(st.sampled_from(BATCH_KEYS), SIZE), ranks=SIZE)
def test_a_solution_keeps_what_was_given_and_multiplies_out_and_anything_else_is_a_problem(sizes, ranks):
    solved = solve_batch_sizes(sizes, world_size=ranks)
    if isinstance(solved, BatchSizes):
        assert holds(solved, ranks)
        by_key = dict(zip(BATCH_KEYS, (solved.train, solved.micro, solved.accumulation), strict=True))
        assert {key: by_key[key] for key in sizes} == sizes
    else:
        known = sizes.get(MICRO, 1) * sizes.get(STEPS, 1) * ranks
        assert sizes[TRAIN] % known or (len(sizes) == 3 and sizes[TRAIN] != known)
        assert str(ranks) in solved[0].sentence


@given(train=SIZE, ranks=SIZE)
def test_the_batch_alone_is_divided_over_the_ranks(train, ranks):
    solved = solve_batch_sizes({TRAIN: train}, world_size=ranks)
    assert isinstance(solved, BatchSizes) == (train % ranks == 0)
    if isinstance(solved, BatchSizes):
        assert solved == BatchSizes(train, train // ranks, 1)


@given(micro=SIZE, ranks=SIZE)
def test_the_micro_batch_alone_is_not_accumulated(micro, ranks):
    assert solve_batch_sizes({MICRO: micro}, world_size=ranks) == BatchSizes(micro * ranks, micro, 1)


@given(size=SIZE, form=st.sampled_from([int, float, str, "{}.0".format, "{}e0".format, " {} ".format]))
def test_a_size_may_be_written_as_any_kind_of_number(size, form):
    assert solve_batch_sizes({MICRO: form(size)}, world_size=1) == BatchSizes(size, size, 1)


def said(config: dict[str, object], world_size: int) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(config, world_size=world_size)
    return str(caught.value)


def test_three_sizes_that_do_not_fit_show_the_arithmetic():
    message = said({TRAIN: 32, MICRO: 4, STEPS: 3}, 2)
    assert "train_micro_batch_size_per_gpu 4 x gradient_accumulation_steps 3 x 2 data-parallel ranks = 24" in message
    assert "Set train_batch_size to 24, or leave one of the three out" in message


@pytest.mark.parametrize(
    ("config", "arithmetic"),
    [
        ({TRAIN: 7, MICRO: 2}, "multiple of train_micro_batch_size_per_gpu 2 x 2 data-parallel ranks = 4. Set it to 4 or 8"),
        ({TRAIN: 7, STEPS: 3}, "multiple of gradient_accumulation_steps 3 x 2 data-parallel ranks = 6. Set it to 6 or 12"),
        ({TRAIN: 1}, "multiple of gradient_accumulation_steps 1 x 2 data-parallel ranks = 2. Set it to 2,"),
    ],
)
def test_a_batch_that_does_not_divide_shows_the_arithmetic_and_the_nearest_that_do(config, arithmetic):
    assert arithmetic in said(config, 2)


@pytest.mark.parametrize("value", [0, -4, 1.5, True, "many", "nan", float("inf"), [4], {"a": 1}])
@pytest.mark.parametrize("key", BATCH_KEYS)
def test_a_size_that_is_no_positive_whole_number_is_named(key, value):
    assert f"{key}: found " in said({key: value}, 1)


@pytest.mark.parametrize(
    ("config", "origins"),
    [
        ({MICRO: 4, STEPS: 3}, {TRAIN: "4 x 3 x 2 data-parallel ranks", MICRO: "given", STEPS: "given"}),
        (
            {TRAIN: 24, MICRO: 4, STEPS: "auto"},
            {STEPS: "auto: 24 / (train_micro_batch_size_per_gpu 4 x 2 data-parallel ranks)"},
        ),
        ({TRAIN: 24}, {MICRO: "24 / (gradient_accumulation_steps 1 x 2 data-parallel ranks)", STEPS: "default"}),
        ({}, {TRAIN: "1 x 1 x 2 data-parallel ranks", MICRO: "default", STEPS: "default"}),
        ({TRAIN: "auto", MICRO: "auto"}, {TRAIN: "auto: 1 x 1 x 2 data-parallel ranks", MICRO: "auto: default"}),
    ],
)
def test_solved_sizes_say_how(config, origins):
    loaded = load_config(config, world_size=2)
    assert {key: str(loaded.origin(key)) for key in origins} == origins
