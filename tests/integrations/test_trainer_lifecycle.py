"""What Hugging Face's Trainer does besides one training: predicting, generating, training again, other models."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    PretrainedConfig,
    PreTrainedModel,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
)

from .common import LENGTH, VOCABULARY, Texts, assert_same, each_stage, each_stage_and_world, isolated, weights
from .trainer import arguments, auto_config, make_trainer

TOLERANCE = 1e-5


def of_all_ranks(world: int) -> dict[str, Any]:
    """Options for one process that takes the samples of ``world`` ranks."""
    return {"per_device_train_batch_size": 2 * world}


@isolated
def predicted(options: dict[str, Any]) -> np.ndarray:
    trainer = make_trainer("unused", **options)
    trainer.train()
    return trainer.predict(Texts(6, seed=2)).predictions


@each_stage
def test_predictions_are_those_of_a_trainer_without(ranks, stage):
    expected = predicted(of_all_ranks(2))
    for result in ranks(2, predicted, {"deepspeed": auto_config(stage)}):
        np.testing.assert_allclose(result, expected, rtol=1e-3, atol=1e-4)


@isolated
def twice(options: dict[str, Any]) -> tuple[dict[str, Tensor], int]:
    trainer = make_trainer("unused", **options)
    trainer.train()
    trainer.evaluate()
    # The first: what makes a Trainer give its model to a new engine. The second: an engine begins with a new optimizer.
    trainer.model_wrapped = trainer.model
    trainer.optimizer = None
    trainer.train()
    return weights(trainer.model), getattr(trainer.model_wrapped, "global_steps", 6)


@isolated
def evaluated_first(options: dict[str, Any]) -> tuple[float, dict[str, Tensor]]:
    trainer = make_trainer("unused", **options)
    loss = trainer.evaluate()["eval_loss"]
    trainer.model_wrapped = trainer.model
    trainer.train()
    return loss, weights(trainer.model)


def test_stage_3_evaluates_before_it_trains(ranks):
    expected, trained = evaluated_first(of_all_ranks(2))
    for loss, result in ranks(2, evaluated_first, {"deepspeed": auto_config(3)}):
        assert loss == pytest.approx(expected, rel=TOLERANCE)
        assert_same(result, trained, TOLERANCE)


@isolated
def refused_a_second_time(stage: int) -> str:
    trainer = make_trainer("unused", deepspeed=auto_config(stage))
    trainer.train()
    with pytest.raises(RuntimeError) as caught:
        trainer.train()
    return str(caught.value)


def test_a_second_training_as_it_is_says_what_to_do(ranks):
    assert "trainer.model_wrapped = trainer.model" in ranks(1, refused_a_second_time, 2)[0]


@each_stage_and_world
def test_a_trainer_trains_again_once_it_is_given_its_model_back(ranks, stage, world):
    expected, _ = twice(of_all_ranks(world))
    for result, steps in ranks(world, twice, {"deepspeed": auto_config(stage)}):
        assert steps == 6
        assert_same(result, expected, TOLERANCE)


@isolated
def twice_with_automatic_batch_size(options: dict[str, Any]) -> dict[str, Tensor]:
    trainer = make_trainer("unused", auto_find_batch_size=True, **options)
    trainer.train()
    trainer.train()
    return weights(trainer.model)


def test_with_an_automatic_batch_size_a_trainer_trains_again_by_itself(ranks):
    expected, _ = twice(of_all_ranks(2))
    for result in ranks(2, twice_with_automatic_batch_size, {"deepspeed": auto_config(2)}):
        assert_same(result, expected, TOLERANCE)


@isolated
def with_activation_checkpointing(options: dict[str, Any]) -> dict[str, Tensor]:
    trainer = make_trainer("unused", activation_checkpointing=True, **options)
    trainer.train()
    assert trainer.model.is_activation_checkpointing
    return weights(trainer.model)


@each_stage
def test_activations_may_be_checkpointed(ranks, stage):
    expected = with_activation_checkpointing(of_all_ranks(2))
    for result in ranks(2, with_activation_checkpointing, {"deepspeed": auto_config(stage)}):
        assert_same(result, expected, TOLERANCE)


class Line(PreTrainedModel):
    """The model of Transformers' own tests: two parameters without dimensions."""

    config_class = PretrainedConfig

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)
        self.a = nn.Parameter(torch.tensor(0.5))
        self.b = nn.Parameter(torch.tensor(-0.25))
        self.post_init()

    def forward(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        y = x * self.a + self.b
        return nn.functional.mse_loss(y, labels), y


def points(size: int) -> list[dict[str, Tensor]]:
    xs = torch.randn(size, generator=torch.Generator().manual_seed(0))
    return [{"x": x, "labels": 2 * x + 1} for x in xs]


@isolated
def line_fitted(options: dict[str, Any]) -> tuple[float, float]:
    trainer = Trainer(Line(PretrainedConfig(hidden_size=1)), arguments("unused", **options), train_dataset=points(40))
    trainer.train()
    return trainer.model.a.item(), trainer.model.b.item()


@each_stage_and_world
def test_parameters_without_dimensions_and_buckets_of_one_element_are_trained(ranks, stage, world):
    expected = line_fitted(of_all_ranks(world))
    for result in ranks(world, line_fitted, {"deepspeed": auto_config(stage)}):
        assert result == pytest.approx(expected, rel=1e-5)


@isolated
def generated(options: dict[str, Any]) -> tuple[np.ndarray, float]:
    torch.manual_seed(3)
    sizes = {"vocab_size": VOCABULARY, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    model = T5ForConditionalGeneration(T5Config(**sizes, dropout_rate=0.0, decoder_start_token_id=0))
    given = arguments("unused", **options).to_dict()
    wanted = {"predict_with_generate": True, "generation_max_length": LENGTH, "generation_num_beams": 2}
    kept = {key: given[key] for key in KEPT}
    args = Seq2SeqTrainingArguments(**kept, **wanted, **SILENT, deepspeed=options.get("deepspeed"))
    trainer = Seq2SeqTrainer(model, args, train_dataset=Texts(40), eval_dataset=Texts(8, seed=1))
    trainer.train()
    output = trainer.predict(Texts(16, seed=1))
    return output.predictions, output.metrics["test_loss"]


KEPT = ("output_dir", "max_steps", "per_device_train_batch_size", "learning_rate", "adam_epsilon", "max_grad_norm")
SILENT: dict[str, Any] = {"use_cpu": True, "save_strategy": "no", "report_to": [], "disable_tqdm": True, "log_level": "error"}


@each_stage
def test_a_sequence_to_sequence_trainer_generates_what_one_without_does(ranks, stage):
    tokens, loss = generated(of_all_ranks(2))
    for result, result_loss in ranks(2, generated, {"deepspeed": auto_config(stage)}):
        assert result_loss == pytest.approx(loss, rel=1e-5)
        np.testing.assert_array_equal(result, tokens)
