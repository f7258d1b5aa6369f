"""Lightning Fabric's DeepSpeedStrategy, against the same loop in plain PyTorch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deepspeed import DeepSpeedEngine
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from .common import assert_same, each_stage, each_stage_and_world, isolated, weights
from .loop import BATCH, CLIP, TOLERANCE, perceptron, samples, sgd

fabric = pytest.importorskip("lightning.fabric", reason="lightning is not installed: make test-integrations")

from lightning.fabric.plugins.environments import TorchElasticEnvironment  # noqa: E402
from lightning.fabric.strategies import DeepSpeedStrategy  # noqa: E402


class CpuStrategy(DeepSpeedStrategy):
    """Fabric's strategy without its demand for CUDA devices, which have an index."""

    def setup_environment(self) -> None:
        super(DeepSpeedStrategy, self).setup_environment()

    def _setup_distributed(self) -> None:
        self._set_world_ranks()
        self._init_deepspeed_distributed()
        self._format_config()
        self._config_initialized = True


def make_fabric(stage: int, world: int, **options: Any) -> Any:
    strategy = CpuStrategy(stage=stage)
    strategy.config["gradient_clipping"] = CLIP
    plugins = [TorchElasticEnvironment()]
    made = fabric.Fabric(accelerator="cpu", devices=world, strategy=strategy, plugins=plugins, **options)
    made.launch()
    return made


def plain(world: int, epochs: int = 1) -> dict[str, Tensor]:
    model = perceptron()
    optimizer = sgd(model)
    for _ in range(epochs):
        for x, y in samples(BATCH * world):
            nn.functional.mse_loss(model(x), y).backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
    return weights(model)


def train(made: Any, model: nn.Module, optimizer: Any) -> None:
    rank, world = made.global_rank, made.world_size
    for x, y in samples(BATCH * world):
        loss = nn.functional.mse_loss(model(x.chunk(world)[rank]), y.chunk(world)[rank])
        made.backward(loss)
        optimizer.step()
        optimizer.zero_grad()


@isolated
def trained(stage: int, world: int) -> tuple[dict[str, Tensor], bool]:
    made = make_fabric(stage, world)
    given = perceptron()
    model, optimizer = made.setup(given, sgd(given))
    train(made, model, optimizer)
    engine = made.strategy.model
    known = type(engine) is DeepSpeedEngine and isinstance(optimizer, DeepSpeedZeroOptimizer)
    # Fabric steps the optimizer itself, past the engine.
    return weights(given), known and engine.global_steps == 0 and optimizer.param_groups is engine.optimizer.param_groups


@each_stage_and_world
def test_a_loop_trains_to_the_numbers_of_plain_pytorch(ranks, stage, world):
    for result, known in ranks(world, trained, stage, world):
        assert_same(result, plain(world), TOLERANCE)
        assert known


@isolated
def saved(folder: str, stage: int) -> dict[str, Tensor]:
    made = make_fabric(stage, 2)
    given = perceptron()
    model, optimizer = made.setup(given, sgd(given))
    train(made, model, optimizer)
    made.save(f"{folder}/state.ckpt", {"model": model, "optimizer": optimizer, "epoch": 1, "seen": torch.arange(3)})
    train(made, model, optimizer)
    return weights(given)


@isolated
def loaded(folder: str, stage: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    made = make_fabric(stage, 2)
    given = perceptron(seed=9)
    model, optimizer = made.setup(given, sgd(given))
    state = {"model": model, "optimizer": optimizer, "epoch": 0, "seen": None}
    rest = made.load(f"{folder}/state.ckpt", state)
    train(made, model, optimizer)
    return weights(given), {"epoch": state["epoch"], "seen": state["seen"], "rest": sorted(rest)}


@each_stage
def test_a_training_goes_on_from_a_saved_state_to_the_same_bits(ranks, tmp_path, stage):
    whole = ranks(2, saved, str(tmp_path), stage)
    assert_same(whole[0], plain(2, epochs=2), TOLERANCE)
    for (result, state), expected in zip(ranks(2, loaded, str(tmp_path), stage), whole, strict=True):
        assert_same(result, expected)
        assert state["epoch"] == 1 and torch.equal(state["seen"], torch.arange(3))


@isolated
def evaluated(precision: str) -> tuple[float, torch.dtype, bool]:
    made = make_fabric(2, 2, precision=precision)
    given = perceptron()
    model = made.setup_module(given)
    x, y = samples(1).dataset.tensors
    with torch.no_grad():
        loss = nn.functional.mse_loss(model(x).float(), y).item()
    return loss, next(given.parameters()).dtype, made.strategy.model.optimizer is None


@pytest.mark.parametrize(("precision", "dtype"), [("32-true", torch.float32), ("bf16-mixed", torch.bfloat16)])
def test_a_module_is_evaluated_without_an_optimizer(ranks, precision, dtype):
    x, y = samples(1).dataset.tensors
    expected = nn.functional.mse_loss(perceptron()(x), y).item()
    for loss, found, without in ranks(2, evaluated, precision):
        assert loss == pytest.approx(expected, rel=1e-6 if dtype == torch.float32 else 0.02)
        assert found == dtype and without
