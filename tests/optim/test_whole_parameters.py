"""LAMB and Muon, which need whole parameters, on slices that cut them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deepspeed.comm.communicator import Communicator
from deepspeed.memory.layout import FlatLayout, ParameterSpec
from deepspeed.optim import FlatShard, Lamb, Muon, Segments, ShardUpdate, build_optimizer, make_stepper, split_parameter_groups
from deepspeed.optim.muon import orthogonalize

SHAPES = {"matrix": (13, 9), "bias": (9,), "wide": (6, 21), "zero": (5,), "scalar": ()}
STEPS = 4
UNUSED = {0: {"wide"}, 2: {"matrix", "bias"}, 3: {"wide", "zero"}}
"""The parameters without a gradient, by step, in the trainings where some have none."""


def values(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    drawn = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    return drawn if seed else {**drawn, "zero": torch.zeros(5)}


def plain(kind: str, params: dict[str, object], in_some_steps: bool) -> dict[str, Tensor]:
    parameters = values(0)
    groups = split_parameter_groups(kind, [{"params": list(parameters.values())}])
    optimizer = build_optimizer(kind, params, groups)
    for step in range(STEPS):
        for name, gradient in values(1 + step).items():
            parameters[name].grad = None if in_some_steps and name in UNUSED.get(step, ()) else gradient
        optimizer.step()
    return parameters


def on_slices(kind: str, params: dict[str, object], in_some_steps: bool) -> dict[str, Tensor]:
    communicator = Communicator()
    parameters = values(0)
    groups = split_parameter_groups(kind, [{"params": list(parameters.values())}])
    group_of = {id(p): index for index, group in enumerate(groups) for p in group["params"]}
    specs = [ParameterSpec(n, tuple(p.shape), "float32", group_of[id(p)]) for n, p in parameters.items()]
    layout = FlatLayout.build(specs, shards=communicator.size, bucket_numel=500)
    optimizer = build_optimizer(kind, params, groups)

    def buffers(of: dict[str, Tensor]) -> list[Tensor]:
        result = [torch.zeros(bucket.numel) for bucket in layout.buckets]
        for name, (bucket, place) in layout.homes.items():
            result[bucket.index][place.start : place.stop] = of[name].reshape(-1)
        return result

    wholes = buffers(parameters)
    own = [bucket.slice_range(communicator.rank) for bucket in layout.buckets]
    shards = [FlatShard(wholes[b.index][own[b.index]], b, communicator.rank) for b in layout.buckets]
    stepper = make_stepper(Segments(optimizer, shards), communicator)
    for step in range(STEPS):
        gradients = buffers(values(1 + step))
        unused = UNUSED.get(step, ()) if in_some_steps else ()
        updates = [ShardUpdate(s, 4 * gradients[s.bucket.index][own[s.bucket.index]], None, unused) for s in shards]
        stepper.step(updates, gradient_scale=0.25, finished=lambda shard: None)
    for whole in wholes:
        communicator.all_gather(whole).wait()
    return {
        name: wholes[bucket.index][place.start : place.stop].view(place.spec.shape)
        for name, (bucket, place) in layout.homes.items()
    }


@pytest.mark.parametrize("in_some_steps", [False, True], ids=["used in each step", "used in some steps"])
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize(
    ("kind", "params"),
    [
        ("Lamb", {"lr": 0.1, "weight_decay": 0.1}),
        ("Lamb", {"lr": 0.1, "max_coeff": 0.5, "min_coeff": 0.4, "bias_correction": False, "eps_inside_sqrt": True}),
        ("Muon", {"lr": 0.02, "adam_lr": 0.003, "weight_decay": 0.1}),
        ("Muon", {"muon_lr": 0.05, "momentum": 0.8, "nesterov": False, "ns_steps": 3}),
    ],
)
def test_slices_step_to_the_values_of_whole_parameters(ranks, size, kind, params, in_some_steps):
    expected = plain(kind, params, in_some_steps)
    for result in ranks(size, on_slices, kind, params, in_some_steps):
        for name, value in result.items():
            torch.testing.assert_close(value, expected[name], msg=lambda text, name=name: f"{name}: {text}")


def test_lamb_follows_its_formula():
    parameter, gradient = torch.randn(4, 6), torch.randn(4, 6)
    before = parameter.clone()
    parameter.grad = gradient
    Lamb([parameter], lr=0.1, weight_decay=0.2).step()
    direction = gradient / (gradient.abs() + 1e-8) + 0.2 * before
    torch.testing.assert_close(parameter, before - 0.1 * before.norm() / direction.norm() * direction)


def test_orthogonalized_matrices_have_singular_values_near_one():
    torch.manual_seed(0)
    for shape in ((20, 30), (30, 20)):
        singular = torch.linalg.svdvals(orthogonalize(torch.randn(shape), 5))
        assert singular.min() > 0.6 and singular.max() < 1.3


def test_muon_takes_the_matrices_that_are_not_marked_otherwise():
    weight, embedding, bias = (torch.nn.Parameter(torch.randn(shape)) for shape in ((3, 4), (9, 4), (4,)))
    embedding.use_muon = False
    groups = split_parameter_groups("Muon", [{"params": [weight, embedding, bias], "weight_decay": 0.5}])
    assert [(group["use_muon"], len(group["params"]), group["weight_decay"]) for group in groups] == [
        (True, 1, 0.5),
        (False, 2, 0.5),
    ]
    optimizer = Muon(groups, lr=0.1, muon_lr=0.2, adam_lr=0.3)
    assert [group["lr"] for group in optimizer.param_groups] == [0.2, 0.3]
    with pytest.raises(ValueError, match="shape"):
        bias.use_muon = True
        split_parameter_groups("muon", [{"params": [bias]}])
