from __future__ import annotations

import inspect
import logging

import pytest
import torch
from torch import nn

import deepspeed
from deepspeed.logs import logger
from tests.engine.test_engine import batch, ds_config, make_engine, make_model, train


def answers() -> dict[str, object]:
    config = ds_config(
        2, gradient_accumulation_steps=3, gradient_clipping=0.5, steps_per_print=float("inf"), bf16={"enabled": False}
    )
    model = make_model()
    engine = deepspeed.initialize(model=model, config=config)[0]
    assert engine.config == config and engine.module is model
    assert type(engine) is deepspeed.DeepSpeedEngine
    return {
        "sizes": engine.get_batch_info(),
        "train": engine.train_batch_size(),
        "micro": engine.train_micro_batch_size_per_gpu(),
        "steps": engine.gradient_accumulation_steps(),
        "optimizer": engine.optimizer_name(),
        "scheduler": engine.scheduler_name(),
        "zero": (engine.zero_optimization(), engine.zero_optimization_stage()),
        "precision": (engine.fp16_enabled(), engine.bfloat16_enabled(), engine.loss_scale()),
        "groups": (engine.get_lr(), engine.get_mom(), engine.get_type()),
        "clipping": engine.gradient_clipping(),
        "print": engine.steps_per_print(),
        "clock": engine.wall_clock_breakdown(),
        "ranks": (engine.local_rank, engine.global_rank, engine.world_size),
        "group": torch.distributed.get_world_size(engine.data_parallel_group),
        "norm": engine.get_global_grad_norm(),
    }


def test_an_engine_answers_what_the_configuration_says(ranks):
    for rank, said in enumerate(ranks(2, answers)):
        assert said == {
            "sizes": (24, 4, 3),
            "train": 24,
            "micro": 4,
            "steps": 3,
            "optimizer": "SGD",
            "scheduler": None,
            "zero": (True, 2),
            "precision": (False, False, 1.0),
            "groups": ([0.1], [0.9], ["SGD"]),
            "clipping": 0.5,
            "print": float("inf"),
            "clock": False,
            "ranks": (rank, rank, 2),
            "group": 2,
            "norm": None,
        }


def with_changed_batch(stage: int, sixteen_bit: bool) -> dict[str, torch.Tensor]:
    more = {"bf16": {"enabled": True}} if sixteen_bit else {}
    engine = make_engine(stage, **more)
    train(engine, 0, 1)
    engine.set_train_batch_size(4 * 2 * 3)
    assert engine.get_batch_info() == (24, 4, 3)
    assert engine.tput_timer.batch_size == 24
    train(engine, 1, 4)
    assert (engine.global_steps, engine.global_samples) == (2, 8 + 24)
    engine.set_train_micro_batch_size(8)
    assert engine.get_batch_info() == (48, 8, 3)
    return {name: value.detach().float() for name, value in engine.module.state_dict().items()}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("sixteen_bit", [False, True])
def test_a_larger_batch_accumulates_over_more_micro_steps(ranks, stage, sixteen_bit):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for indices in (range(2), range(2, 8)):
        for index in indices:
            (model(batch(index)).square().mean() / len(indices)).backward()
        optimizer.step()
        optimizer.zero_grad()
    tolerance = {"rtol": 0.05, "atol": 0.01} if sixteen_bit else {"rtol": 1e-6, "atol": 1e-7}
    for result in ranks(2, with_changed_batch, stage, sixteen_bit):
        for name, value in model.state_dict().items():
            torch.testing.assert_close(result[name], value, **tolerance)


def impossible_batches() -> list[str]:
    engine = make_engine(1, gradient_accumulation_steps=2)
    said = []
    with pytest.raises(ValueError) as caught:
        engine.set_train_batch_size(12)
    said.append(str(caught.value))
    with pytest.raises(ValueError) as caught:
        engine.set_train_micro_batch_size(0)
    said.append(str(caught.value))
    train(engine, 0, 1)
    with pytest.raises(RuntimeError) as caught:
        engine.set_train_batch_size(16)
    said.append(str(caught.value))
    return said


def test_an_impossible_batch_size_is_answered_with_the_arithmetic(ranks):
    for multiple, micro, midway in ranks(2, impossible_batches):
        assert "train_batch_size 12 is not a multiple of 8: 4 samples per micro-step on each of 2 ranks" in multiple
        assert "at least 1 sample, got 0" in micro
        assert "1 micro-steps of this one have passed" in midway


def several_losses(stage: int) -> tuple[dict[str, torch.Tensor], int]:
    engine = make_engine(stage)
    rank, size = engine.communicator.rank, engine.communicator.size
    engine.communicator.log.clear()
    with engine.coalesce_grad_reduction():
        for index in range(3):
            engine.backward(engine(batch(index * size + rank)).square().mean())
    engine.step()
    reductions = engine.communicator.log.total("reduce_scatter", "all_reduce").count
    buckets = len(engine.optimizer.flat.layout.buckets)
    return {name: value.detach().clone() for name, value in engine.module.state_dict().items()}, reductions // buckets


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_coalesced_backwards_reduce_once_and_add_up(ranks, stage):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for index in range(6):
        (model(batch(index)).square().mean() / 2).backward()
    optimizer.step()
    for weights, reductions in ranks(2, several_losses, stage):
        assert reductions == 1
        for name, value in model.state_dict().items():
            torch.testing.assert_close(weights[name], value, rtol=1e-6, atol=1e-7)


def unknown_attributes() -> tuple[object, str]:
    class Model(nn.Linear):
        dtype_of_model = "known to the module"

    engine = deepspeed.initialize(model=Model(2, 2), config=ds_config(0))[0]
    with pytest.raises(AttributeError) as caught:
        engine.no_such_thing  # noqa: B018
    return engine.dtype_of_model, str(caught.value)


def test_attributes_that_the_engine_does_not_have_are_the_modules(ranks):
    known, message = ranks(1, unknown_attributes)[0]
    assert known == "known to the module"
    assert "no_such_thing" in message


def test_integrations_find_the_arguments_that_they_look_for():
    assert "exclude_frozen_parameters" in inspect.signature(deepspeed.DeepSpeedEngine.save_checkpoint).parameters
    backward = inspect.signature(deepspeed.DeepSpeedEngine.backward).parameters
    assert {"retain_graph", "scale_wrt_gas"} <= set(backward)


def announced(level: str) -> list[str]:
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logger.addHandler(handler)
    before = logger.level
    try:
        make_engine(1, dump_state=True, log_level=level)
    finally:
        logger.setLevel(before)
        logger.removeHandler(handler)
    return records


def test_the_first_rank_announces_the_run_and_dumps_the_effective_configuration(ranks):
    first, second = ranks(2, announced, "info")
    assert "DeepSpeed info: version=" in first[0] and "ZeRO stage 1, 2 ranks, 8 samples per step" in first[0]
    assert '"train_batch_size": 8' in first[1] and '"allgather_bucket_size": null' in first[1]
    assert second == []


def test_the_log_level_of_the_configuration_silences_it(ranks):
    assert ranks(1, announced, "error") == [[]]
