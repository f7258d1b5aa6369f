from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepspeed.memory.layout import ALIGNMENT, FlatLayout, ParameterSpec

shapes = st.lists(st.integers(0, 9), max_size=3).map(tuple)
units = st.one_of(st.none(), st.integers(0, 2))
models = st.lists(st.tuples(shapes, st.sampled_from(["float32", "bfloat16"]), st.integers(0, 2), units), max_size=12).map(
    lambda rows: [ParameterSpec(f"p{i}", *row) for i, row in enumerate(rows)]
)


@given(models, st.integers(1, 5), st.integers(0, 400))
def test_every_element_of_every_parameter_lies_in_exactly_one_slice(specs, shards, bucket_numel):
    layout = FlatLayout.build(specs, shards=shards, bucket_numel=bucket_numel)
    covered = {spec.name: [0] * spec.numel for spec in specs}
    for bucket in layout.buckets:
        for shard in range(shards):
            for fragment in bucket.fragments(shard):
                for i in range(fragment.parameter_start, fragment.parameter_start + fragment.numel):
                    covered[fragment.spec.name][i] += 1
    assert all(count == 1 for counts in covered.values() for count in counts)


@given(models, st.integers(1, 5), st.integers(0, 400))
def test_fragments_lie_where_the_placement_says(specs, shards, bucket_numel):
    layout = FlatLayout.build(specs, shards=shards, bucket_numel=bucket_numel)
    for bucket in layout.buckets:
        for shard in range(shards):
            for fragment in bucket.fragments(shard):
                home, placement = layout.homes[fragment.spec.name]
                assert home is bucket
                in_bucket = bucket.slice_range(shard).start + fragment.slice_start
                assert in_bucket == placement.start + fragment.parameter_start


@given(models, st.integers(1, 5), st.integers(0, 400))
def test_buckets_are_uniform_aligned_bounded_and_gaps_are_the_rest(specs, shards, bucket_numel):
    layout = FlatLayout.build(specs, shards=shards, bucket_numel=bucket_numel)
    assert sorted(layout.homes) == sorted(spec.name for spec in specs)
    for bucket in layout.buckets:
        assert bucket.numel % (shards * ALIGNMENT) == 0
        kinds = {(p.spec.group, p.spec.dtype, p.spec.unit) for p in bucket.placements}
        assert kinds == {(bucket.group, bucket.dtype, bucket.unit)}
        assert all(p.start % ALIGNMENT == 0 for p in bucket.placements)
        assert bucket.unit is not None or len(bucket.placements) == 1 or bucket.placements[-1].stop <= bucket_numel
        inside = sum(p.spec.numel for p in bucket.placements)
        assert inside + sum(gap.stop - gap.start for gap in bucket.gaps) == bucket.numel
    assert layout.numel == shards * layout.slice_numel
    assert layout.parameter_numel == sum(spec.numel for spec in specs)


def test_buckets_come_in_the_order_of_backward():
    specs = [ParameterSpec(name, (40,), "float32") for name in "abc"]
    layout = FlatLayout.build(specs, shards=2, bucket_numel=64)
    assert [[p.spec.name for p in bucket.placements] for bucket in layout.buckets] == [["c"], ["b"], ["a"]]


def test_a_unit_is_one_bucket_for_each_group_and_dtype_whatever_its_size():
    specs = [ParameterSpec(f"p{i}", (40,), "float32", group=i % 2, unit=i // 4) for i in range(8)]
    layout = FlatLayout.build(specs, shards=2, bucket_numel=1)
    assert [(bucket.unit, bucket.group, len(bucket.placements)) for bucket in layout.buckets] == [
        (1, 1, 2),
        (1, 0, 2),
        (0, 1, 2),
        (0, 0, 2),
    ]


def test_a_bucket_comes_when_its_last_parameter_does():
    """Small parameters of all layers share a bucket that backward completes last: no unit waits for it."""
    specs = [ParameterSpec(f"p{i}", (40,), "float32", unit=None if i % 2 else i) for i in range(5)]
    layout = FlatLayout.build(specs, shards=2, bucket_numel=1000)
    assert [bucket.unit for bucket in layout.buckets] == [4, 2, None, 0]


def test_a_layout_for_no_shards_is_refused():
    with pytest.raises(ValueError, match="at least one shard, got 0"):
        FlatLayout.build([], shards=0, bucket_numel=1)


def test_an_extended_layout_leaves_the_buckets_that_there_are_in_place():
    specs = [ParameterSpec(f"p{i}", (50 + i,), "float32" if i % 3 else "bfloat16", group=i % 2) for i in range(8)]
    layout = FlatLayout.build(specs[:5], shards=3, bucket_numel=120)
    extended = layout.extended(specs[5:], bucket_numel=120)
    assert extended.buckets[: len(layout.buckets)] == layout.buckets
    assert [bucket.index for bucket in extended.buckets] == list(range(len(extended.buckets)))
    assert extended.homes.keys() == {spec.name for spec in specs}
    alone = FlatLayout.build(specs[5:], shards=3, bucket_numel=120)
    assert [(b.group, b.dtype, b.placements, b.numel) for b in extended.buckets[len(layout.buckets) :]] == [
        (b.group, b.dtype, b.placements, b.numel) for b in alone.buckets
    ]


@given(models, st.integers(1, 5), st.sets(st.integers(0, 11)))
def test_where_parameters_have_left_are_gaps_and_the_others_stay(specs, shards, left):
    names = {f"p{i}" for i in left}
    layout = FlatLayout.build(specs, shards=shards, bucket_numel=100)
    thinned = layout.without(names)
    assert [(b.index, b.numel) for b in thinned.buckets] == [(b.index, b.numel) for b in layout.buckets]
    assert {n: p.start for n, (_, p) in thinned.homes.items()} == {
        name: place.start for name, (_, place) in layout.homes.items() if name not in names
    }
