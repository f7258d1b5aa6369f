from __future__ import annotations

import pytest
import torch
from torch import nn

from deepspeed.comm.communicator import Communicator
from deepspeed.comm.sharding import ShardGroups
from deepspeed.memory.layout import FlatLayout, ParameterSpec
from deepspeed.optim.loss_scaling import DynamicLossScaler, NoLossScaler
from deepspeed.zero.optimizer import ShardedOptimizer
from deepspeed.zero.parameters import FlatParameters
from deepspeed.zero.policy import ZeroPolicy
from deepspeed.zero.reducer import GradientReducer, ReductionSettings
from deepspeed.zero.unfreezing import FrozenParameters

STEPS = 4


class Model(nn.Module):
    """Odd sizes, a tied weight, a 0-dim, an empty and a never-used parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(7, 13)
        self.second = nn.Linear(13, 7, bias=False)
        self.last = nn.Linear(7, 13, bias=False)
        self.last.weight = self.first.weight
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.empty = nn.Parameter(torch.zeros(0))
        self.unused = nn.Parameter(torch.ones(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.second(torch.tanh(self.first(x))))) * self.scale


def batch(index: int) -> torch.Tensor:
    return torch.randn(3, 7, generator=torch.Generator().manual_seed(100 + index))


def make_model() -> Model:
    torch.manual_seed(1)
    return Model()


def sgd(parameters: object) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.01)


def shard(
    model: nn.Module, stage: int, *, clip: float = 0.0, scaler: object = None, **settings: object
) -> ShardedOptimizer:
    communicator = Communicator()
    optimizer = sgd(model.parameters())
    policy = ZeroPolicy.for_stage(stage)
    named = dict(model.named_parameters())
    specs = [ParameterSpec(name, tuple(p.shape), "float32") for name, p in named.items()]
    layout = FlatLayout.build(specs, shards=communicator.size if stage else 1, bucket_numel=64)
    flat = FlatParameters(layout, named, shard=communicator.rank if stage else 0)
    for _ in flat.move_in(communicator):
        pass
    reduction = ReductionSettings(divide_before=communicator.size, **settings)
    reducer = GradientReducer(layout, named, policy=policy, groups=ShardGroups.whole(communicator), settings=reduction)
    frozen = FrozenParameters(named, optimizer.param_groups, bucket_numel=64)
    return ShardedOptimizer(optimizer, flat, reducer, frozen=frozen, scaler=scaler or NoLossScaler(), clip=clip, overlap=True)


def train_sharded(stage: int, accumulation: int, clip: float) -> dict[str, object]:
    model = make_model()
    optimizer = shard(model, stage, clip=clip)
    rank, size = optimizer.communicator.rank, optimizer.communicator.size
    optimizer.communicator.log.clear()
    norms = []
    for step in range(STEPS):
        for micro in range(accumulation):
            last = micro == accumulation - 1
            optimizer.reducer.begin(reduce=last or stage == 2)
            loss = model(batch((step * accumulation + micro) * size + rank)).square().mean() / accumulation
            loss.backward()
            optimizer.reducer.finish()
        optimizer.step()
        norms.append(optimizer.outcome.norm)
    return {
        "weights": {name: p.detach().clone() for name, p in model.named_parameters()},
        "norms": norms,
        "numel": optimizer.flat.layout.numel,
        "wire": optimizer.communicator.log.total("all_reduce", "reduce_scatter", "all_gather").wire_nbytes,
    }


def train_plain(size: int, accumulation: int, clip: float) -> tuple[dict[str, torch.Tensor], list[float]]:
    model = make_model()
    optimizer = sgd(model.parameters())
    norms = []
    for step in range(STEPS):
        for index in range(accumulation * size):
            loss = model(batch(step * accumulation * size + index)).square().mean()
            (loss / (accumulation * size)).backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), clip or float("inf"))))
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach() for name, p in model.named_parameters()}, norms


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_every_stage_trains_to_the_numbers_of_plain_torch(ranks, stage, size, accumulation, clip):
    expected, norms = train_plain(size, accumulation, clip)
    for result in ranks(size, train_sharded, stage, accumulation, clip):
        assert result["norms"] == pytest.approx(norms, rel=1e-5)
        for name, weight in expected.items():
            torch.testing.assert_close(result["weights"][name], weight, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("size", [2, 4])
def test_stages_one_and_two_are_equal_bit_for_bit(ranks, size):
    one, two = (ranks(size, train_sharded, stage, 1, 0.05) for stage in (1, 2))
    for first, second in zip(one, two, strict=True):
        assert first["norms"] == second["norms"]
        for name, weight in first["weights"].items():
            assert torch.equal(weight, second["weights"][name])


@pytest.mark.parametrize(("stage", "accumulation", "volume"), [(0, 1, 2), (0, 4, 2), (1, 4, 2), (2, 1, 2), (2, 4, 5)])
def test_each_step_sends_the_volume_of_its_stage(ranks, stage, accumulation, volume):
    for result in ranks(2, train_sharded, stage, accumulation, 0.0):
        agreement = 2 * 8 * 64 * STEPS
        parameters = 4 * result["numel"] * (2 - 1) // 2 * STEPS
        assert volume * parameters <= result["wire"] <= volume * parameters + agreement


def skip_non_finite() -> tuple[bool, float, bool]:
    model = make_model()
    optimizer = shard(model, 2, scaler=DynamicLossScaler(initial_scale_power=4, hysteresis=1))
    before = [p.detach().clone() for p in model.parameters()]
    factor = float("inf") if optimizer.communicator.rank == 1 else 1.0
    optimizer.reducer.begin(reduce=True)
    (model(batch(0)).sum() * factor).backward()
    optimizer.reducer.finish()
    optimizer.step()
    same = all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    return optimizer.overflow, optimizer.loss_scale, same


def test_an_infinite_gradient_on_one_rank_skips_the_step_on_all_and_halves_the_loss_scale(ranks):
    assert ranks(2, skip_non_finite) == [(True, 8.0, True)] * 2


def unused_on_one_rank(stage: int) -> dict[str, torch.Tensor]:
    model = make_model()
    optimizer = shard(model, stage)
    for step in range(2):
        optimizer.reducer.begin(reduce=True)
        loss = model(batch(step)).square().mean()
        if optimizer.communicator.rank == 1:
            loss = loss + model.unused.sum()
        loss.backward()
        optimizer.reducer.finish()
        optimizer.step()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_parameter_used_on_one_rank_only_gets_the_mean_gradient(ranks, stage):
    model = make_model()
    optimizer = sgd(model.parameters())
    for step in range(2):
        (model(batch(step)).square().mean() + model.unused.sum() / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    for result in ranks(2, unused_on_one_rank, stage):
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(result[name], parameter.detach(), rtol=1e-6, atol=1e-7)


def with_late_gradients(stage: int) -> torch.Tensor:
    """Two backwards before one step: the second finds its buckets already reduced."""
    model = make_model()
    optimizer = shard(model, stage)
    optimizer.reducer.begin(reduce=True)
    model(batch(0)).square().mean().backward()
    model(batch(1)).square().mean().backward()
    optimizer.reducer.finish()
    optimizer.step()
    return model.first.weight.detach().clone()


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_gradients_that_arrive_after_their_bucket_was_reduced_count_in_the_same_step(ranks, stage):
    model = make_model()
    optimizer = sgd(model.parameters())
    (model(batch(0)).square().mean() + model(batch(1)).square().mean()).backward()
    optimizer.step()
    for weight in ranks(2, with_late_gradients, stage):
        torch.testing.assert_close(weight, model.first.weight.detach(), rtol=1e-6, atol=1e-7)


def closed() -> tuple[int, bool]:
    model = make_model()
    optimizer = shard(model, 2)
    optimizer.close()
    model(batch(0)).sum().backward()
    return len(optimizer.state), model.first.weight.grad is not None


def test_closing_gives_the_model_back_without_hooks(ranks):
    assert ranks(1, closed) == [(0, True)]
