"""Misuse is answered by a clear error on every rank at once, and leaves nothing half-done."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import deepspeed
from tests.parity import Training, generator, make_engine, sgd, state_of, train_engine

WIDTH = 8
SOURCE = Path(__file__).parent.parent.parent / "src"


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))


def inputs(index: int) -> torch.Tensor:
    return torch.randn(3, WIDTH, generator=generator(index))


def squared_output(model: nn.Module, index: int, backward) -> None:
    backward(model(inputs(index)).square().mean())


TRAINING = Training(perceptron, squared_output)


def ds_config(**more: object) -> dict[str, object]:
    return {"train_micro_batch_size_per_gpu": 1, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}, **more}


def message_of(call) -> str:
    with pytest.raises((RuntimeError, ValueError, TypeError)) as caught:
        call()
    return f"{type(caught.value).__name__}: {caught.value}"


def misused_engine(stage: int) -> tuple[list[str], bool]:
    engine = make_engine(TRAINING, stage)
    messages = [
        message_of(engine.step),
        message_of(lambda: engine.backward(engine(inputs(0)))),
        message_of(lambda: engine.backward(torch.tensor(1.0))),
        message_of(lambda: engine.backward(engine(inputs(0)).mean().item())),
        message_of(lambda: engine.train_batch()),
        message_of(lambda: engine.optimizer.step(lambda: 0.0)),
        message_of(lambda: engine.optimizer.add_param_group({"params": []})),
    ]
    with engine.no_sync():
        squared_output(engine, 0, engine.backward)
        messages.append(message_of(engine.step))
    engine.zero_grad()
    for index in range(3):
        squared_output(engine, index, engine.backward)
        engine.step()
    messages.append(message_of(engine.step))
    plain = train_engine(TRAINING, stage) if engine.destroy() is None else None
    return messages, all(torch.equal(value, plain.weights[name]) for name, value in state_of(engine.module).items())


@pytest.mark.parametrize("stage", [0, 2])
def test_a_misused_engine_says_what_to_do_and_trains_on_as_if_nothing_had_been(ranks, stage):
    for messages, unharmed in ranks(1, misused_engine, stage):
        expected = [
            "RuntimeError: engine.step() was called before engine.backward(loss)",
            "ValueError: engine.backward(loss) needs a scalar, got shape (3, 8)",
            "ValueError: engine.backward(loss): the loss has no gradient",
            "ValueError: engine.backward(loss) needs a tensor, got float",
            "ValueError: train_batch() needs a data_iter, or training_data",
            "ValueError: a sharded optimizer steps on reduced gradients",
            "RuntimeError: parameter groups cannot be added",
            "RuntimeError: engine.step() was called inside no_sync()",
            "RuntimeError: engine.step() was called before engine.backward(loss)",
        ]
        for message, start in zip(messages, expected, strict=True):
            assert message.startswith(start)
        assert unharmed


def without_optimizer() -> list[str]:
    engine = deepspeed.initialize(model=perceptron(), config={"train_micro_batch_size_per_gpu": 1})[0]
    loss = engine(inputs(0)).square().mean()
    return [message_of(lambda: engine.backward(loss)), message_of(engine.step)]


def test_an_engine_without_an_optimizer_says_what_it_lacks(ranks):
    for message in ranks(1, without_optimizer)[0]:
        assert "needs an optimizer: give deepspeed.initialize an optimizer" in message


def frozen(model: nn.Module) -> dict[str, object]:
    model.requires_grad_(False)
    return {}


def frozen_in_a_client_optimizer(model: nn.Module) -> dict[str, object]:
    optimizer = sgd(model.parameters())
    model.requires_grad_(False)
    return {"optimizer": optimizer}


def used_up_generator(model: nn.Module) -> dict[str, object]:
    parameters = (p for p in model.parameters() if p.requires_grad)
    list(parameters)
    return {"model_parameters": parameters}


def of_another_model(model: nn.Module) -> dict[str, object]:
    return {"optimizer": sgd(perceptron().parameters())}


def partly_of_another_model(model: nn.Module) -> dict[str, object]:
    return {"model_parameters": [*model.parameters(), nn.Parameter(torch.ones(5))]}


def mixed_groups(model: nn.Module) -> dict[str, object]:
    return {"model_parameters": [{"params": [model[0].weight]}, model[0].bias]}


def stepped(model: nn.Module) -> dict[str, object]:
    optimizer = torch.optim.Adam(model.parameters())
    squared_output(model, 0, lambda loss: loss.backward())
    optimizer.step()
    return {"optimizer": optimizer}


def not_an_optimizer(model: nn.Module) -> dict[str, object]:
    return {"optimizer": "Adam"}


def lbfgs(model: nn.Module) -> dict[str, object]:
    return {"optimizer": torch.optim.LBFGS(model.parameters())}


def lbfgs_by_a_callable(model: nn.Module) -> dict[str, object]:
    return {"optimizer": torch.optim.LBFGS}


def unknown_optimizer(model: nn.Module) -> dict[str, object]:
    return {"config": ds_config(optimizer={"type": "Adamm"})}


def unknown_option(model: nn.Module) -> dict[str, object]:
    return {"config": ds_config(optimizer={"type": "Adam", "params": {"weight_decy": 0.1}})}


def unknown_schedule(model: nn.Module) -> dict[str, object]:
    return {"config": ds_config(scheduler={"type": "WarmupLRR"})}


def unknown_schedule_option(model: nn.Module) -> dict[str, object]:
    return {"config": ds_config(scheduler={"type": "WarmupLR", "params": {"warmup_max_lrr": 1}})}


def no_configuration(model: nn.Module) -> dict[str, object]:
    return {"config": None}


def malformed_json(model: nn.Module) -> dict[str, object]:
    return {"config": '{"train_batch_size": 4,'}


def missing_file(model: nn.Module) -> dict[str, object]:
    return {"config": "no/such/file.json"}


BAD_ARGUMENTS = [
    (frozen, "the model has no trainable parameters"),
    (frozen_in_a_client_optimizer, "the model has no trainable parameters"),
    (used_up_generator, "model_parameters is empty"),
    (of_another_model, "4 of the 4 parameters to optimize are not parameters of the model (shapes (8, 8), (8,)"),
    (partly_of_another_model, "1 of the 5 parameters to optimize are not parameters of the model (shapes (5,))"),
    (mixed_groups, "mixes parameters and parameter groups"),
    (stepped, "has already stepped"),
    (not_an_optimizer, "got str"),
    (lbfgs, "LBFGS cannot be sharded"),
    (lbfgs_by_a_callable, "LBFGS cannot be sharded"),
    (unknown_optimizer, "Adamm"),
    (unknown_option, "Did you mean 'weight_decay'"),
    (unknown_schedule, "WarmupLRR"),
    (unknown_schedule_option, "Did you mean 'warmup_max_lr'"),
    (no_configuration, "needs a configuration"),
    (malformed_json, "JSON"),
    (missing_file, "no/such/file.json"),
]


def refused(arguments) -> tuple[str, bool, bool]:
    """What ``initialize`` says to bad arguments, whether the model is as it was, and whether good ones then work."""
    model = perceptron()
    given = arguments(model)
    before = state_of(model)
    message = message_of(lambda: deepspeed.initialize(model=model, **{"config": ds_config(), **given}))
    unchanged = all(torch.equal(value, before[name]) for name, value in state_of(model).items())
    model.requires_grad_(True)
    engine = deepspeed.initialize(model=model, config=ds_config())[0]
    squared_output(engine, 0, engine.backward)
    engine.step()
    return message, unchanged, engine.global_steps == 1


@pytest.mark.parametrize(("arguments", "message"), BAD_ARGUMENTS, ids=lambda value: getattr(value, "__name__", ""))
def test_initialize_refuses_bad_arguments_and_leaves_the_model_as_it_was(ranks, arguments, message):
    for said, unchanged, works_then in ranks(2, refused, arguments):
        assert message in said
        assert unchanged
        assert works_then


def refused_on_rank_one(arguments) -> str:
    model = perceptron()
    given = arguments(model) if dist.get_rank() == 1 else {}
    return message_of(lambda: deepspeed.initialize(model=model, **{"config": ds_config(), **given}))


@pytest.mark.parametrize(("arguments", "message"), [BAD_ARGUMENTS[0], BAD_ARGUMENTS[2], BAD_ARGUMENTS[3]])
def test_what_is_wrong_on_one_rank_alone_is_said_on_all(ranks, arguments, message):
    first, second = ranks(2, refused_on_rank_one, arguments)
    assert message in second
    assert "deepspeed.initialize failed on rank 1" in first and message in first


def wider_on_rank_one() -> dict[str, object]:
    return {"model": nn.Linear(4, 8 + dist.get_rank())}


def deeper_on_rank_one() -> dict[str, object]:
    return {"model": nn.Sequential(*[nn.Linear(4, 4) for _ in range(1 + dist.get_rank())])}


def double_on_rank_one() -> dict[str, object]:
    return {"model": nn.Linear(4, 4, dtype=torch.float64 if dist.get_rank() else torch.float32)}


def partly_frozen_on_rank_one() -> dict[str, object]:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].requires_grad_(dist.get_rank() == 0)
    return {"model": model}


def other_buffer_on_rank_one() -> dict[str, object]:
    model = nn.Linear(4, 4)
    model.register_buffer("seen", torch.zeros(1 + dist.get_rank()))
    return {"model": model}


def other_rate_on_rank_one() -> dict[str, object]:
    optimizer = {"type": "SGD", "params": {"lr": 0.1 * (1 + dist.get_rank())}}
    return {"model": nn.Linear(4, 4), "config": ds_config(optimizer=optimizer)}


def other_stage_on_rank_one() -> dict[str, object]:
    return {"model": nn.Linear(4, 4), "config": ds_config(zero_optimization={"stage": 1 + dist.get_rank()})}


def other_groups_on_rank_one() -> dict[str, object]:
    model = nn.Linear(4, 4)
    groups = [{"params": [model.weight]}, {"params": [model.bias]}]
    return {"model": model, "model_parameters": groups if dist.get_rank() else model.parameters()}


def disagree(arguments) -> str:
    return message_of(lambda: deepspeed.initialize(**{"config": ds_config(), **arguments()}))


@pytest.mark.parametrize(
    ("arguments", "first", "second"),
    [
        (wider_on_rank_one, "'weight: (8, 4) torch.float32, group 0'", "'weight: (9, 4) torch.float32, group 0'"),
        (deeper_on_rank_one, "", "'1.weight: (4, 4) torch.float32, group 0'"),
        (double_on_rank_one, "torch.float32", "torch.float64"),
        (partly_frozen_on_rank_one, "'0.weight: (4, 4) torch.float32, group 0'", "torch.float32, group 0, frozen'"),
        (other_buffer_on_rank_one, "'buffer seen: (1,) torch.float32'", "'buffer seen: (2,) torch.float32'"),
        (other_rate_on_rank_one, "'lr': 0.1", "'lr': 0.2"),
        (other_stage_on_rank_one, "'stage': 1", "'stage': 2"),
        (other_groups_on_rank_one, "'weight: ", "'parameter group 1 of SGD"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_ranks_that_disagree_all_say_on_what(ranks, arguments, first, second):
    for message in ranks(2, disagree, arguments):
        assert message.startswith("ValueError: ranks disagree on the model or configuration: rank 0 has '")
        assert "where rank 1 has '" in message
        assert first in message and second in message


def initialized_twice() -> list[str]:
    model = perceptron()
    engine = deepspeed.initialize(model=model, config=ds_config())[0]
    said = message_of(lambda: deepspeed.initialize(model=model, config=ds_config()))
    squared_output(engine, 0, engine.backward)
    engine.step()
    engine.destroy()
    deepspeed.initialize(model=model, config=ds_config())
    return [said]


def test_a_model_is_trained_by_one_engine_at_a_time(ranks):
    assert "already trained by an engine (its parameter '0.weight' is): call destroy()" in ranks(1, initialized_twice)[0][0]


RAISES_IN_FORWARD = """
import os, sys, torch, deepspeed
from torch import nn
rank = int(os.environ["RANK"])
model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
engine = deepspeed.initialize(model=model, config={
    "train_micro_batch_size_per_gpu": 1, "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
    "zero_optimization": {"stage": 2, "reduce_bucket_size": 1}})[0]
def fail(*args):
    if rank == 1 and engine.global_steps == 1:
        raise ValueError("a bad sample in PLACE")
if "PLACE" == "forward":
    model[1].register_forward_hook(fail)
else:
    model[0].weight.register_hook(fail)
for step in range(3):
    engine.backward(engine(torch.ones(2, 8)).square().mean())
    engine.step()
"""


@pytest.mark.parametrize("place", ["forward", "backward"])
def test_a_rank_that_raises_takes_its_peers_down_with_its_own_traceback_first(tmp_path, place):
    path = tmp_path / "script.py"
    path.write_text(RAISES_IN_FORWARD.replace("PLACE", place))
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-m", "deepspeed", "--num_gpus", "2", str(path)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert result.returncode == 1
    summary = [line for line in result.stderr.splitlines() if line.startswith("deepspeed: ")]
    assert summary[0].startswith("deepspeed: rank 1 failed on")
    assert summary[0].endswith(f"ValueError: a bad sample in {place}")
