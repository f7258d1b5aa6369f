"""The base case: stages 0, 1 and 2 train to the numbers of plain PyTorch, whatever buckets and reductions are set."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import deepspeed
from deepspeed.memory.estimate import ModelStateBytes
from tests.parity import Training, assert_equal, assert_parity, generator, make_engine, train_engine


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 33), nn.Tanh(), nn.Linear(33, 16), nn.LayerNorm(16), nn.Linear(16, 3))


def squared_output(model: nn.Module, index: int, backward) -> None:
    x = torch.randn(4, 16, generator=generator(index))
    backward(model(x).square().mean())


def training(**config: object) -> Training:
    accumulation = int(config.pop("gradient_accumulation_steps", 1))
    return Training(perceptron, squared_output, accumulation=accumulation, config=config)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_every_stage_trains_to_the_numbers_of_plain_torch(ranks, size, accumulation):
    assert_parity(ranks, training(gradient_accumulation_steps=accumulation), size)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_clipping_by_the_true_global_norm(ranks, accumulation):
    assert_parity(ranks, training(gradient_accumulation_steps=accumulation, gradient_clipping=0.01))


@pytest.mark.parametrize(
    "config",
    [
        {"prescale_gradients": True},
        {"prescale_gradients": False},
        {"prescale_gradients": True, "gradient_predivide_factor": 4.0},
        {"gradient_predivide_factor": 0.5, "gradient_accumulation_steps": 2},
        {"communication_data_type": "fp32"},
        {"zero_optimization": {"round_robin_gradients": True}},
        {"zero_optimization": {"contiguous_gradients": True, "allgather_partitions": True}},
        {"zero_optimization": {"overlap_comm": False}},
        {"zero_optimization": {"overlap_comm": True, "reduce_bucket_size": 1}},
        {"zero_optimization": {"reduce_scatter": False}},
        {"zero_optimization": {"reduce_scatter": False, "overlap_comm": False}, "gradient_accumulation_steps": 2},
        {"zero_optimization": {"reduce_bucket_size": 0}},
        {"zero_optimization": {"reduce_bucket_size": 97, "allgather_bucket_size": 1}},
        {"zero_optimization": {"reduce_bucket_size": 500_000_000, "allgather_bucket_size": 500_000_000}},
    ],
    ids=str,
)
def test_how_gradients_are_bucketed_and_reduced_does_not_change_the_numbers(ranks, config):
    assert_parity(ranks, training(**config))


def test_communication_in_a_narrower_dtype_rounds_gradients_and_nothing_else(ranks):
    assert_parity(ranks, training(communication_data_type="bf16"), tolerance=2**-8)


def without_sharing(stage: int, bucket: int) -> dict[str, torch.Tensor]:
    return train_engine(training(zero_optimization={"reduce_bucket_size": bucket}), stage).weights


def test_weights_do_not_depend_on_where_in_a_bucket_they_lie(ranks):
    """Sums run in rank order, so another layout gives the same bits."""
    first = ranks(4, without_sharing, 2, 1)[0]
    for bucket in (100, 10_000):
        assert_equal(ranks(4, without_sharing, 2, bucket)[0], first)


def sent(stage: int, accumulation: int) -> tuple[int, float]:
    """Elements of the layout, and elements that this rank sent per step for gradients and parameters."""
    one_bucket = {"zero_optimization": {"reduce_bucket_size": 10_000}}
    engine = make_engine(training(gradient_accumulation_steps=accumulation, **one_bucket), stage)
    log = engine.communicator.log
    log.clear()
    for index in range(2 * accumulation):
        squared_output(engine, index, engine.backward)
        engine.step()
    numel = engine.optimizer.flat.layout.numel
    # Smaller messages are the agreement on norms and flags.
    nbytes = sum(tally.wire_nbytes for (_, message), tally in log.tallies.items() if message >= 4 * numel)
    return numel, nbytes / 4 / 2


@pytest.mark.parametrize(
    ("stage", "accumulation", "volume"),
    [(0, 1, 2), (0, 4, 2), (1, 1, 2), (1, 4, 2), (2, 1, 2), (2, 4, 5)],
)
@pytest.mark.parametrize("size", [2, 4])
def test_each_step_sends_the_volume_of_its_stage(ranks, size, stage, accumulation, volume):
    """In units of P (N - 1) / N per rank: 2 at stages 0 and 1 with any accumulation a, a + 1 at stage 2."""
    for numel, elements in ranks(size, sent, stage, accumulation):
        assert elements == volume * numel * (size - 1) / size


def states_of(stage: int) -> tuple[int, ModelStateBytes]:
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(256, 256) for _ in range(4)])
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW"},
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 256},
    }
    numel = sum(p.numel() for p in model.parameters())
    engine = deepspeed.initialize(model=model, config=config)[0]
    for _ in range(2):
        engine.backward(engine(torch.randn(2, 256, dtype=torch.bfloat16)).float().mean())
        states = engine.model_state_bytes()
        engine.step()
    return numel, states


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(("stage", "whole", "sharded"), [(0, 16, 0), (1, 4, 12), (2, 2, 14), (3, 0, 16)])
def test_model_states_take_the_bytes_of_their_stage(ranks, size, stage, whole, sharded):
    """bf16 with Adam: 16 bytes per parameter, 4 + 12/N, 2 + 14/N, 16/N."""
    for numel, states in ranks(size, states_of, stage):
        assert states.total == pytest.approx(numel * (whole + sharded / size), rel=0.02)
