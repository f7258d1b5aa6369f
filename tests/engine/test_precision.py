"""16-bit training with fp32 masters, loss scaling and autocast, against loops in plain PyTorch."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

import deepspeed
from tests.parity import (
    Training,
    assert_parity,
    generator,
    make_engine,
    seeded_model,
    sgd,
    state_of,
)

WIDTH = 16
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 33), nn.Tanh(), nn.Linear(33, WIDTH))


def inputs(index: int) -> Tensor:
    return torch.randn(4, WIDTH, generator=generator(index))


def squared_output(model: nn.Module, index: int, backward) -> None:
    backward(model(inputs(index).to(next(model.parameters()).dtype)).float().square().mean())


def with_masters(dtype: torch.dtype, steps: list[Sequence[int]], divisor: int, scale: float = 1.0) -> list[Tensor]:
    """The fp32 masters after a loop as Micikevicius et al. (2018) describe it: a 16-bit model and fp32 masters, which
    step on the losses of each of ``steps``, the indices of micro-batches, summed and divided by ``divisor``."""
    model = seeded_model(Training(perceptron, squared_output))
    masters = [p.detach().clone() for p in model.parameters()]
    model.to(dtype)
    optimizer = sgd(masters)
    for micros in steps:
        for master in masters:
            master.grad = torch.zeros_like(master)
        for index in micros:
            squared_output(model, index, lambda loss: (loss * scale).backward())
            for parameter, master in zip(model.parameters(), masters, strict=True):
                assert parameter.grad is not None and master.grad is not None
                master.grad += parameter.grad.float() / (scale * divisor)
                parameter.grad = None
        optimizer.step()
        with torch.no_grad():
            for parameter, master in zip(model.parameters(), masters, strict=True):
                parameter.copy_(master)
    return masters


def masters_of(engine: deepspeed.DeepSpeedEngine) -> list[Tensor]:
    """The whole fp32 masters, in the model's order."""
    optimizer = engine.optimizer
    wholes = []
    for master in optimizer.flat.masters:
        parts = optimizer.communicator.gather_objects(master) if optimizer.policy.shard_optimizer else [master]
        wholes.append(torch.cat(parts))
    homes = [optimizer.flat.layout.homes[name] for name in optimizer.flat.parameters]
    return [wholes[bucket.index][p.start : p.stop].view(p.spec.shape) for bucket, p in homes]


def train(training: Training, stage: int) -> tuple[list[Tensor], dict[str, Tensor]]:
    engine = make_engine(training, stage)
    rank, size = engine.communicator.rank, engine.communicator.size
    for index in range(training.steps * training.accumulation):
        training.micro_step(engine, index * size + rank, engine.backward)
        engine.step()
    return masters_of(engine), state_of(engine.module)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("precision", [{"bf16": {"enabled": True}}, {"fp16": {"enabled": True, "loss_scale": 128.0}}])
def test_sixteen_bit_models_train_on_fp32_masters(ranks, stage, accumulation, precision):
    (name,) = precision
    dtype, scale = DTYPES[name], 128.0 if name == "fp16" else 1.0
    micros = 2 * accumulation
    expected = with_masters(dtype, [range(s * micros, (s + 1) * micros) for s in range(5)], micros, scale)
    training = Training(perceptron, squared_output, steps=5, accumulation=accumulation, config=precision)
    initial = list(seeded_model(training).parameters())
    for masters, weights in ranks(2, train, training, stage):
        for ours, theirs, start in zip(masters, expected, initial, strict=True):
            assert ours.dtype == torch.float32
            # A reduced gradient is rounded to the model's dtype, the sums over steps are not.
            assert (ours - theirs).norm() <= torch.finfo(dtype).eps * (theirs - start).norm()
        for ours, weight in zip(masters, weights.values(), strict=True):
            assert weight.dtype == dtype
            assert torch.equal(weight, ours.to(dtype))


def train_without_synchronization(stage: int, also_on_rank_one: bool) -> list[Tensor]:
    """Of 16 micro-batches all but the last accumulate on their rank, or only those of rank 0."""
    config = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    engine = make_engine(Training(perceptron, squared_output, config=config), stage)
    rank = engine.communicator.rank
    with engine.no_sync():
        for index in range(rank, 30, 2) if rank == 0 or also_on_rank_one else []:
            squared_output(engine, index, lambda loss: engine.backward(loss / 16))
    squared_output(engine, 30 + rank, lambda loss: engine.backward(loss / 16))
    engine.step()
    return masters_of(engine)


# At stage 3 all ranks must run the same number of forwards.
@pytest.mark.parametrize(("stage", "also_on_rank_one"), [(s, o) for s in (0, 1, 2) for o in (True, False)] + [(3, True)])
def test_without_synchronization_gradients_accumulate_in_fp32_where_the_configuration_says_so(ranks, stage, also_on_rank_one):
    micros = range(32) if also_on_rank_one else [*range(0, 30, 2), 30, 31]
    expected = with_masters(torch.bfloat16, [micros], 32)
    initial = list(seeded_model(Training(perceptron, squared_output)).parameters())
    for masters in ranks(2, train_without_synchronization, stage, also_on_rank_one):
        for ours, theirs, start in zip(masters, expected, initial, strict=True):
            assert (ours - theirs).norm() <= 2**-8 * (theirs - start).norm()


def small_updates(stage: int) -> tuple[list[float], list[bool]]:
    optimizer = {"type": "SGD", "params": {"lr": 1e-4}}
    training = Training(perceptron, squared_output, config={"bf16": {"enabled": True}, "optimizer": optimizer})
    engine = make_engine(training, stage)
    first = masters_of(engine)
    weights = state_of(engine.module)
    squared_output(engine, 0, engine.backward)
    engine.step()
    moved = [float((after != before).float().mean()) for after, before in zip(masters_of(engine), first, strict=True)]
    held = [torch.equal(state_of(engine.module)[name], weight) for name, weight in weights.items()]
    return moved, held


def test_masters_keep_updates_that_the_model_cannot_hold(ranks):
    for stage in (0, 2):
        moved, held = ranks(1, small_updates, stage)[0]
        assert min(moved) > 0.9
        assert any(held)


def test_masters_start_from_the_precision_that_the_model_came_with(ranks):
    for masters in ranks(2, initial_masters):
        for master, parameter in zip(masters, seeded_model(Training(perceptron, squared_output)).parameters(), strict=True):
            assert torch.equal(master, parameter)


def initial_masters() -> list[Tensor]:
    return masters_of(make_engine(Training(perceptron, squared_output, config={"bf16": {"enabled": True}}), 2))


def autocast_forward(model: nn.Module, index: int, backward) -> None:
    backward(model(inputs(index)).float().square().mean())


def plain_autocast_forward(model: nn.Module, index: int, backward) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(inputs(index))
    assert output.dtype == torch.bfloat16
    backward(output.float().square().mean())


@pytest.mark.parametrize("accumulation", [1, 2])
def test_torch_autocast_computes_in_bf16_on_fp32_parameters(ranks, accumulation):
    config = {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
    training = Training(perceptron, autocast_forward, accumulation=accumulation, config=config)
    plain = Training(perceptron, plain_autocast_forward, accumulation=accumulation)
    assert_parity(ranks, training, plain=plain, tolerance=1e-4)


def scale_with_fp16_autocast() -> tuple[float, torch.dtype, float]:
    config = {"torch_autocast": {"enabled": True, "dtype": "float16"}}
    engine = make_engine(Training(perceptron, autocast_forward, config=config), 1)
    seen = []
    engine.module.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    autocast_forward(engine, 0, engine.backward)
    engine.step()
    return engine.optimizer.loss_scale, seen[0], engine.get_global_grad_norm()


def test_fp16_autocast_scales_the_loss(ranks):
    scale, dtype, norm = ranks(1, scale_with_fp16_autocast)[0]
    assert (scale, dtype) == (65536.0, torch.float16)
    model = seeded_model(Training(perceptron, autocast_forward))
    autocast_forward(model, 0, lambda loss: loss.backward())
    expected = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    assert norm == pytest.approx(float(expected), rel=0.01)


FP16 = {"enabled": True, "initial_scale_power": 8, "loss_scale_window": 2, "hysteresis": 1}
WARMUP = {"scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": 0.01, "warmup_max_lr": 0.1, "warmup_num_steps": 10}}}


def with_an_overflow(stage: int) -> dict[str, object]:
    """Four steps; in the third, rank 1's loss is infinite."""
    engine = make_engine(Training(perceptron, squared_output, config={"fp16": FP16, **WARMUP}), stage)
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("DeepSpeed").addHandler(handler)
    seen = []
    for step in range(4):
        before = state_of(engine.module), masters_of(engine)
        factor = float("inf") if (step, engine.communicator.rank) == (2, 1) else 1.0
        squared_output(engine, step, lambda loss, factor=factor: engine.backward(loss * factor))
        engine.step()
        after = state_of(engine.module), masters_of(engine)
        changed = any(not torch.equal(a, b) for a, b in zip(before[1], after[1], strict=True))
        seen.append((engine.optimizer.overflow, engine.skipped_steps, engine.optimizer.loss_scale, engine.get_lr()[0], changed))
    logging.getLogger("DeepSpeed").removeHandler(handler)
    return {"seen": seen, "steps": engine.global_steps, "samples": engine.global_samples, "messages": messages}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_an_overflow_skips_step_and_schedule_and_halves_the_scale_on_every_rank(ranks, stage):
    results = ranks(2, with_an_overflow, stage)
    for result in results:
        flags, skipped, scales, rates, changed = zip(*result["seen"], strict=True)
        assert flags == (False, False, True, False)
        assert skipped == (0, 0, 1, 1)
        assert scales == (256, 512, 256, 256)
        assert changed == (True, True, False, True)
        assert rates[1] == rates[2] < rates[3]
        assert (result["steps"], result["samples"]) == (4, 8)
    messages = "\n".join(message for result in results for message in result["messages"])
    assert "step 3 skipped: non-finite gradient in " in messages
    for name in ("0.weight", "0.bias", "2.weight", "2.bias"):
        assert name in messages


def skipping(stage: int, config: dict[str, object], skip: bool) -> list[Tensor]:
    engine = make_engine(Training(perceptron, squared_output, config=config), stage)
    for step in range(4):
        if skip and step == 1:
            squared_output(engine, 50, lambda loss: engine.backward(loss * float("nan")))
            engine.step()
        squared_output(engine, step, engine.backward)
        engine.step()
    return masters_of(engine)


@pytest.mark.parametrize("config", [{}, {"bf16": {"enabled": True}}, {"fp16": {"enabled": True, "loss_scale": 64.0}}])
def test_a_skipped_step_leaves_no_trace(ranks, config):
    for stage in (0, 2):
        with_skip, without = (ranks(2, skipping, stage, config, skip) for skip in (True, False))
        for ours, theirs in zip(with_skip[0], without[0], strict=True):
            assert torch.equal(ours, theirs)


class FrozenHalf(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.trained = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("shift", torch.ones(WIDTH))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        return self.trained(self.frozen(x)) + self.shift


def bytes_with_frozen(stage: int) -> dict[str, float]:
    engine = make_engine(Training(FrozenHalf, squared_output, config={"bf16": {"enabled": True}}), stage)
    for index in range(2):
        squared_output(engine, index, engine.backward)
        states = vars(engine.model_state_bytes())
        engine.step()
    dtypes = {name: value.dtype for name, value in engine.module.state_dict().items()}
    return {**states, "dtypes": dtypes}


@pytest.mark.parametrize(("stage", "shards"), [(0, 1), (1, 2), (2, 2), (3, 2)])
def test_only_trained_parameters_have_gradients_masters_and_states(ranks, stage, shards):
    trained = WIDTH * WIDTH + WIDTH
    padded = -(-WIDTH * WIDTH // 64) * 64 + -(-WIDTH // 64) * 64
    for result in ranks(2, bytes_with_frozen, stage):
        assert result["master"] == result["optimizer"] == pytest.approx(4 * trained / shards, rel=0.25)
        assert result["parameters"] <= 2 * (trained + padded)
        assert result["gradients"] <= 2 * padded
        assert result["dtypes"].pop("count") == torch.long
        assert set(result["dtypes"].values()) == {torch.bfloat16}
