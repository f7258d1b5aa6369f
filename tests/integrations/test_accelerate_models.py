"""Several models in one program that trains through Accelerate."""

from __future__ import annotations

import torch
from accelerate import Accelerator, DeepSpeedPlugin, PartialState
from torch import Tensor, nn

from deepspeed import DeepSpeedEngine

from .common import assert_same, each_stage, isolated, weights
from .loop import BATCH, TOLERANCE, make_accelerator, perceptron, plain, samples, sgd


@isolated
def distilled(stage: int) -> tuple[dict[str, Tensor], bool]:
    """A student trained towards a teacher: two models, each with a configuration of its own."""
    PartialState(cpu=True)
    batch = {"train_micro_batch_size_per_gpu": BATCH, "gradient_accumulation_steps": 1}
    student_config = {"zero_optimization": {"stage": stage}, **batch}
    teacher_config = {"zero_optimization": {"stage": 0}, **batch}
    plugins = {
        "student": DeepSpeedPlugin(hf_ds_config=student_config),
        "teacher": DeepSpeedPlugin(hf_ds_config=teacher_config),
    }
    accelerator = Accelerator(deepspeed_plugins=plugins)
    model = perceptron()
    student, _, loader = accelerator.prepare(model, sgd(model), samples(BATCH))
    accelerator.state.select_deepspeed_plugin("teacher")
    teacher = accelerator.prepare(perceptron(seed=9)).eval()
    accelerator.state.select_deepspeed_plugin("student")
    for x, _ in loader:
        with torch.no_grad():
            target = teacher(x)
        accelerator.backward(nn.functional.mse_loss(student(x), target))
    still = all(torch.equal(p, q) for p, q in zip(teacher.parameters(), perceptron(seed=9).parameters(), strict=True))
    return weights(model), still and type(teacher) is DeepSpeedEngine


@each_stage
def test_two_models_have_two_engines(ranks, stage):
    model, teacher = perceptron(), perceptron(seed=9)
    optimizer = sgd(model)
    for x, _ in samples(BATCH * 2):
        nn.functional.mse_loss(model(x), teacher(x).detach()).backward()
        optimizer.step()
        optimizer.zero_grad()
    for result, teacher_is_as_it_was in ranks(2, distilled, stage):
        assert_same(result, weights(model), TOLERANCE)
        assert teacher_is_as_it_was


@isolated
def both_trained(stage: int) -> list[dict[str, Tensor]]:
    """Two models that are trained in turns, each through an accelerator of its own."""
    accelerators = [make_accelerator(stage), Accelerator()]
    models = [perceptron(3), perceptron(9)]
    prepared = [
        accelerator.prepare(model, sgd(model), samples(BATCH))
        for accelerator, model in zip(accelerators, models, strict=True)
    ]
    for batches in zip(*(loader for _, _, loader in prepared), strict=True):
        for accelerator, (engine, _, _), (x, y) in zip(accelerators, prepared, batches, strict=True):
            with accelerator.accumulate(engine):
                accelerator.backward(nn.functional.mse_loss(engine(x), y))
    return [weights(model) for model in models]


@each_stage
def test_two_models_are_trained_in_turns(ranks, stage):
    expected = [plain(2, seed) for seed in (3, 9)]
    for results in ranks(2, both_trained, stage):
        for result, weights_expected in zip(results, expected, strict=True):
            assert_same(result, weights_expected, TOLERANCE)


@isolated
def both_saved(folder: str, stage: int) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """Two engines of one accelerator, before they are saved and after they were changed and loaded."""
    accelerator = make_accelerator(stage)
    models = [perceptron(3), perceptron(9)]
    for model in models:
        accelerator.prepare(model, sgd(model), samples(BATCH))
    before = [weights(model) for model in models]
    accelerator.save_state(folder)
    for model in models:
        for parameter in model.parameters():
            parameter.data.zero_()
    accelerator.load_state(folder)
    return before, [weights(model) for model in models]


@each_stage
def test_two_models_are_saved_and_loaded_together(ranks, tmp_path, stage):
    for before, after in ranks(2, both_saved, str(tmp_path), stage):
        for one, other in zip(before, after, strict=True):
            assert_same(other, one)
    assert (tmp_path / "pytorch_model").is_dir() and (tmp_path / "pytorch_model_1").is_dir()
