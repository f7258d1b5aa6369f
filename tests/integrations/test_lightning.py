"""Lightning's DeepSpeedStrategy, against the same training in plain PyTorch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler

import deepspeed
from deepspeed.runtime.lr_schedules import WarmupLR
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from .common import assert_same, each_stage, each_stage_and_world, isolated, weights
from .loop import ACCUMULATION, BATCH, CLIP, LR, STEPS, TOLERANCE, perceptron, plain, samples, schedule, sgd

lightning = pytest.importorskip("lightning.pytorch", reason="lightning is not installed: make test-integrations")

from lightning.pytorch.plugins.environments import TorchElasticEnvironment  # noqa: E402
from lightning.pytorch.strategies import DeepSpeedStrategy  # noqa: E402
from lightning.pytorch.utilities.deepspeed import convert_zero_checkpoint_to_fp32_state_dict  # noqa: E402


class CpuStrategy(DeepSpeedStrategy):
    """Lightning's strategy without its demand for CUDA devices, which have an index."""

    def setup_environment(self) -> None:
        super(DeepSpeedStrategy, self).setup_environment()

    def setup_distributed(self) -> None:
        self.set_world_ranks()
        self._init_deepspeed_distributed()


class Regression(lightning.LightningModule):
    def __init__(self, seed: int = 3, scheduled: bool = True) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = perceptron(seed)
        self.scheduled = scheduled

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        x, y = batch
        loss = nn.functional.mse_loss(self.model(x), y)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        x, y = batch
        self.log("loss", nn.functional.mse_loss(self.model(x), y), sync_dist=True)

    test_step = validation_step

    def predict_step(self, batch: list[Tensor], index: int) -> Tensor:
        return self.model(batch[0])

    def configure_optimizers(self) -> Any:
        optimizer = sgd(self.model)
        if not self.scheduled:
            return optimizer
        return [optimizer], [{"scheduler": schedule(optimizer), "interval": "step"}]


def make_trainer(strategy: DeepSpeedStrategy, world: int, **options: Any) -> Any:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    given = {"accumulate_grad_batches": ACCUMULATION, "gradient_clip_val": CLIP, "max_epochs": 1, **quiet, **options}
    ours = {"plugins": [TorchElasticEnvironment()], "use_distributed_sampler": False}
    return lightning.Trainer(accelerator="cpu", devices=world, strategy=strategy, **ours, **given)


def loader() -> DataLoader[Any]:
    """This rank's batches, in order: Lightning's own sampler shuffles."""
    data = samples(BATCH).dataset
    return DataLoader(data, BATCH, sampler=DistributedSampler(data, shuffle=False))


@isolated
def fitted(stage: int, world: int) -> dict[str, Any]:
    module = Regression()
    trainer = make_trainer(CpuStrategy(stage=stage), world)
    trainer.fit(module, loader(), loader())
    engine, (optimizer,) = trainer.strategy.deepspeed_engine, trainer.optimizers
    return {
        "weights": weights(module.model),
        "validation": trainer.validate(module, loader(), verbose=False)[0]["loss"],
        "test": trainer.test(module, loader(), verbose=False)[0]["loss"],
        "predictions": torch.cat(trainer.predict(module, loader())),
        "steps": (trainer.global_step, engine.global_steps),
        "engine": type(engine) is deepspeed.DeepSpeedEngine,
        "optimizer": isinstance(optimizer, DeepSpeedZeroOptimizer) and isinstance(optimizer.optimizer, torch.optim.SGD),
    }


def validation_loss(state: dict[str, Tensor]) -> float:
    model = perceptron()
    model.load_state_dict(state)
    x, y = samples(1).dataset.tensors
    return nn.functional.mse_loss(model(x), y).item()


DIVIDED_AGAIN = 1 / ACCUMULATION
"""Lightning divides a loss by the accumulation steps, and so does an engine that it tells of them."""


@each_stage_and_world
def test_fitting_trains_to_the_numbers_of_plain_pytorch(ranks, stage, world):
    expected = plain(world, decay=1, scale=DIVIDED_AGAIN)
    loss = validation_loss(expected)
    for result in ranks(world, fitted, stage, world):
        assert_same(result["weights"], expected, TOLERANCE)
        assert result["validation"] == result["test"] == pytest.approx(loss, rel=1e-5)
        assert result["predictions"].shape == (samples(1).dataset.tensors[0].shape[0] // world, 1)
        assert result["steps"] == (STEPS * 2 // world,) * 2
        assert result["engine"] and result["optimizer"]


@isolated
def saved(folder: str, stage: int, world: int) -> tuple[dict[str, Tensor], float]:
    """A training of two epochs that saves after the first."""
    checkpoints = lightning.callbacks.ModelCheckpoint(dirpath=folder, filename="{epoch}", save_top_k=-1)
    module = Regression()
    trainer = make_trainer(
        CpuStrategy(stage=stage), world, max_epochs=2, enable_checkpointing=True, callbacks=[checkpoints]
    )
    trainer.fit(module, loader())
    return weights(module.model), trainer.strategy.deepspeed_engine.get_lr()[0]


@isolated
def resumed(checkpoint: str, stage: int, world: int) -> tuple[dict[str, Tensor], float]:
    module = Regression(seed=9)
    trainer = make_trainer(CpuStrategy(stage=stage), world, max_epochs=2)
    trainer.fit(module, loader(), ckpt_path=checkpoint)
    return weights(module.model), trainer.strategy.deepspeed_engine.get_lr()[0]


@each_stage
def test_a_checkpoint_is_a_directory_from_which_a_training_goes_on_to_the_same_bits(ranks, tmp_path, stage):
    whole = ranks(2, saved, str(tmp_path), stage, 2)
    checkpoint = tmp_path / "epoch=0.ckpt"
    assert sorted(path.name for path in checkpoint.iterdir()) == ["checkpoint", "latest", "zero_to_fp32.py"]
    for (result, rate), (expected, expected_rate) in zip(ranks(2, resumed, str(checkpoint), stage, 2), whole, strict=True):
        assert_same(result, expected)
        assert rate == expected_rate


@each_stage
def test_lightnings_own_conversion_of_a_checkpoint_gives_a_file_that_its_module_loads(ranks, tmp_path, stage):
    trained, _ = ranks(2, saved, str(tmp_path), stage, 2)[0]
    file = tmp_path / "single.ckpt"
    states = convert_zero_checkpoint_to_fp32_state_dict(tmp_path / "epoch=1.ckpt", file)
    assert states["epoch"] == 1 and states["hyper_parameters"] == {"seed": 3, "scheduled": True}
    assert_same(weights(Regression.load_from_checkpoint(file).model), trained)


@isolated
def configured(world: int) -> tuple[str, float, bool]:
    """Optimizer and schedule from the configuration."""
    config = {
        "zero_optimization": {"stage": 2},
        "optimizer": {"type": "AdamW", "params": {"lr": LR}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": LR, "warmup_num_steps": 4, "warmup_type": "linear"}},
    }
    module = Regression(scheduled=False)
    trainer = make_trainer(CpuStrategy(config=config), world)
    trainer.fit(module, loader())
    (schedule_config,) = trainer.lr_scheduler_configs
    name = trainer.strategy.deepspeed_engine.optimizer_name()
    return name, trainer.optimizers[0].param_groups[0]["lr"], isinstance(schedule_config.scheduler, WarmupLR)


def test_optimizer_and_schedule_may_come_from_the_configuration(ranks):
    assert ranks(2, configured, 2) == [("AdamW", LR, True)] * 2


@isolated
def in_precision(precision: str) -> tuple[torch.dtype, float]:
    module = Regression()
    trainer = make_trainer(CpuStrategy(stage=2), 2, precision=precision)
    trainer.fit(module, loader())
    return next(module.parameters()).dtype, trainer.validate(module, loader(), verbose=False)[0]["loss"]


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_a_16_bit_training_comes_near_the_fp32_one(ranks, precision):
    expected = validation_loss(plain(2, decay=1, scale=DIVIDED_AGAIN))
    for dtype, loss in ranks(2, in_precision, precision):
        assert dtype == torch.bfloat16
        assert loss == pytest.approx(expected, rel=0.05)


@isolated
def only_evaluated(stage: int) -> tuple[float, bool]:
    module = Regression()
    trainer = make_trainer(CpuStrategy(stage=stage), 2)
    loss = trainer.validate(module, loader(), verbose=False)[0]["loss"]
    return loss, trainer.strategy.deepspeed_engine.optimizer is None


def test_a_module_is_evaluated_without_an_optimizer(ranks):
    expected = validation_loss(perceptron().state_dict())
    for loss, without in ranks(2, only_evaluated, 2):
        assert loss == pytest.approx(expected, rel=1e-6) and without
