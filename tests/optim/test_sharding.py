from __future__ import annotations

from collections.abc import Collection, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deepspeed.memory.layout import FlatLayout, ParameterSpec
from deepspeed.optim import Adam, FlatShard, Lion, Segments, ShardUpdate, build_optimizer, has_stepped, make_stepper

ALONE: Any = SimpleNamespace(rank=0, size=1)
KINDS = {
    "Adam": {"weight_decay": 0.1, "adam_w_mode": False},
    "AdamW": {"weight_decay": 0.1},
    "Lion": {"weight_decay": 0.1},
    "SGD": {"momentum": 0.9, "weight_decay": 0.1},
    "Adagrad": {"initial_accumulator_value": 0.1},
    "RMSprop": {"momentum": 0.5},
    "NAdam": {},
    "RAdam": {},
    "Adamax": {},
    "Adadelta": {},
    "ASGD": {},
    "Rprop": {},
}
ALL_USED: Mapping[int, Collection[str]] = {}


def laid_out(shapes: list[tuple[int, ...]], shards: int, bucket_numel: int = 100) -> FlatLayout:
    specs = [ParameterSpec(f"p{index}", shape, "float32") for index, shape in enumerate(shapes)]
    return FlatLayout.build(specs, shards=shards, bucket_numel=bucket_numel)


def flattened(layout: FlatLayout, values: dict[str, Tensor]) -> list[Tensor]:
    buffers = [torch.zeros(bucket.numel) for bucket in layout.buckets]
    for name, value in values.items():
        bucket, place = layout.homes[name]
        buffers[bucket.index][place.start : place.stop] = value.reshape(-1)
    return buffers


def random_values(layout: FlatLayout, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(place.spec.shape, generator=generator) for name, (_, place) in layout.homes.items()}


def sharded_steps(
    kind: str,
    layout: FlatLayout,
    steps: int,
    *,
    gradient_scale: float = 1.0,
    unused: Mapping[int, Collection[str]] = ALL_USED,
) -> dict[str, Tensor]:
    """Parameters after ``steps`` steps of every shard in turn; ``unused`` are those without a gradient, by step."""
    buffers = flattened(layout, random_values(layout, 0))
    for shard in range(layout.shards):
        shards = [FlatShard(buffers[b.index][b.slice_range(shard)], b, shard) for b in layout.buckets]
        optimizer = build_optimizer(kind, KINDS[kind], [{"params": [s.tensor for s in shards]}])
        stepper = make_stepper(Segments(optimizer, shards), ALONE)
        for step in range(steps):
            gradients = flattened(layout, random_values(layout, 100 + step))
            updates = [
                ShardUpdate(
                    s,
                    gradients[s.bucket.index][s.bucket.slice_range(shard)] / gradient_scale,
                    None,
                    unused.get(step, ()),
                )
                for s in shards
            ]
            finished: list[FlatShard] = []
            stepper.step(updates, gradient_scale=gradient_scale, finished=finished.append)
            assert finished == shards
    return {
        name: buffers[bucket.index][place.start : place.stop].view(place.spec.shape)
        for name, (bucket, place) in layout.homes.items()
    }


def plain_steps(
    kind: str, layout: FlatLayout, steps: int, unused: Mapping[int, Collection[str]] = ALL_USED
) -> dict[str, Tensor]:
    parameters = random_values(layout, 0)
    optimizer = build_optimizer(kind, KINDS[kind], [{"params": list(parameters.values())}])
    for step in range(steps):
        for name, gradient in random_values(layout, 100 + step).items():
            parameters[name].grad = None if name in unused.get(step, ()) else gradient
        optimizer.step()
    return parameters


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shards", [1, 3])
def test_slices_step_to_the_values_of_whole_parameters(kind, shards):
    layout = laid_out([(7, 5), (), (40,), (0,), (3, 9)], shards)
    expected = plain_steps(kind, layout, 3)
    for name, value in sharded_steps(kind, layout, 3).items():
        torch.testing.assert_close(value, expected[name], msg=lambda text, name=name: f"{name}: {text}")


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.integers(0, 90).map(lambda n: (n,)), min_size=1, max_size=6),
    st.integers(1, 3),
    st.sampled_from(["AdamW", "Lion", "SGD"]),
)
def test_any_layout_steps_as_plain(shapes, shards, kind):
    layout = laid_out(shapes, shards)
    expected = plain_steps(kind, layout, 2)
    for name, value in sharded_steps(kind, layout, 2).items():
        torch.testing.assert_close(value, expected[name])


@pytest.mark.parametrize("kind", ["AdamW", "Lion", "SGD"])
def test_the_gradient_factor_is_folded_in(kind):
    layout = laid_out([(7, 5), (40,)], 2)
    expected = plain_steps(kind, layout, 3)
    for name, value in sharded_steps(kind, layout, 3, gradient_scale=1 / 8).items():
        torch.testing.assert_close(value, expected[name])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shards", [1, 3])
def test_each_parameter_takes_the_steps_in_which_it_has_a_gradient(kind, shards):
    layout = laid_out([(7, 5), (40,), (0,), (20,), (3, 9)], shards)
    unused = {0: {"p1"}, 1: {"p1", "p3"}, 3: {"p0", "p4"}, 4: {"p0", "p1", "p2", "p3", "p4"}}
    expected = plain_steps(kind, layout, 6, unused)
    for name, value in sharded_steps(kind, layout, 6, unused=unused).items():
        torch.testing.assert_close(value, expected[name], msg=lambda text, name=name: f"{name}: {text}")


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.integers(0, 90).map(lambda n: (n,)), min_size=1, max_size=6),
    st.integers(1, 3),
    st.dictionaries(st.integers(0, 3), st.sets(st.sampled_from(["p0", "p1", "p2", "p3", "p4", "p5"]))),
    st.sampled_from(["AdamW", "SGD", "NAdam"]),
)
def test_any_layout_counts_steps_by_parameter(shapes, shards, unused, kind):
    layout = laid_out(shapes, shards)
    expected = plain_steps(kind, layout, 4, unused)
    for name, value in sharded_steps(kind, layout, 4, unused=unused).items():
        torch.testing.assert_close(value, expected[name])


def test_a_slice_is_stepped_as_one_until_its_parameters_take_different_steps():
    layout = laid_out([(40,), (20,), (30,)], 1, bucket_numel=200)
    shard = FlatShard(torch.zeros(layout.numel), layout.buckets[0], 0)
    optimizer = Adam([shard.tensor])
    segments = Segments(optimizer, [shard])
    stepper = make_stepper(segments, ALONE)
    seen = []
    for unused in ((), {"p0", "p1", "p2"}, {"p1"}, (), {"p1"}):
        update = ShardUpdate(shard, torch.ones(layout.numel), None, unused)
        stepper.step([update], gradient_scale=1.0, finished=lambda shard: None)
        seen.append([float(optimizer.state[tensor]["step"]) for tensor in optimizer.param_groups[0]["params"]])
    assert seen == [[1], [1], [2, 1, 2], [3, 2, 3], [4, 2, 4]]
    storages = {optimizer.state[segment.tensor]["exp_avg"].untyped_storage().data_ptr() for segment in segments}
    assert len(storages) == 1, "a cut copies no states"


@pytest.mark.parametrize("kind", ["AdamW", "Lion", "SGD"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_parameters_receive_the_rounded_masters(kind, dtype):
    layout = laid_out([(40,)], 1)
    shard = FlatShard(torch.randn(64), layout.buckets[0], 0)
    optimizer = build_optimizer(kind, KINDS[kind], [{"params": [shard.tensor]}])
    out = torch.zeros(64, dtype=dtype)
    update = ShardUpdate(shard, torch.randn(64).to(dtype), out)
    make_stepper(Segments(optimizer, [shard]), ALONE).step([update], gradient_scale=0.5, finished=lambda shard: None)
    assert torch.equal(out, shard.tensor.to(dtype))
    assert shard.tensor.grad is None


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.LBFGS([p]),
        lambda p: torch.optim.SparseAdam([p]),
        lambda p: torch.optim.Adafactor([p]),
    ],
)
def test_an_optimizer_that_cannot_be_sharded_is_refused_by_name(make):
    tensor = torch.zeros(32)
    optimizer = make(tensor)
    with pytest.raises(ValueError, match=type(optimizer).__name__):
        make_stepper(Segments(optimizer, [FlatShard(tensor, laid_out([(32,)], 1).buckets[0], 0)]), ALONE)


def test_an_optimizer_whose_closure_is_required_is_refused():
    class NeedsClosure(torch.optim.SGD):
        def step(self, closure):
            return closure()

    tensor = torch.zeros(32)
    with pytest.raises(ValueError, match="closure"):
        make_stepper(Segments(NeedsClosure([tensor]), [FlatShard(tensor, laid_out([(32,)], 1).buckets[0], 0)]), ALONE)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("decoupled", [False, True])
def test_adam_is_torchs_adam(weight_decay, decoupled):
    ours, theirs = torch.randn(5, 7), None
    theirs = ours.clone()
    first = Adam([ours], lr=0.01, weight_decay=weight_decay, adam_w_mode=decoupled)
    second = (torch.optim.AdamW if decoupled else torch.optim.Adam)([theirs], lr=0.01, weight_decay=weight_decay)
    for _ in range(5):
        ours.grad = torch.randn(5, 7)
        theirs.grad = ours.grad.clone()
        first.step()
        second.step()
    torch.testing.assert_close(ours, theirs)
    assert first.state[ours]["step"] == 5


def test_lion_follows_its_formula():
    parameter, gradient = torch.randn(300), torch.randn(300)
    before = parameter.clone()
    parameter.grad = gradient
    optimizer = Lion([parameter], lr=0.1, betas=(0.9, 0.99), weight_decay=0.5)
    optimizer.step()
    torch.testing.assert_close(parameter, before * (1 - 0.05) - 0.1 * gradient.sign())
    torch.testing.assert_close(optimizer.state[parameter]["exp_avg"], 0.01 * gradient)


def test_states_made_at_construction_are_no_step():
    parameter = torch.zeros(3)
    optimizer = torch.optim.Adagrad([parameter])
    assert not has_stepped(optimizer)
    parameter.grad = torch.ones(3)
    optimizer.step()
    assert has_stepped(optimizer)
