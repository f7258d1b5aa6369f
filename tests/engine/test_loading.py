"""Loading parts of a checkpoint, in another precision, in one's own way, and of a save in the midst of a step."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from tests.engine.test_checkpointing import TRAINING, WIDTH, Model, saved, squared_output, train
from tests.parity import Training, assert_close, assert_equal, make_engine, seeded_model, sgd, state_of

SIXTEEN_BIT = Training(Model, squared_output, config={**TRAINING.config, "bf16": {"enabled": True}})


class Larger(nn.Module):
    """The same model under another name, with a part of its own and more rows in the last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Model()
        self.model.last = nn.Linear(WIDTH, WIDTH + 5)
        self.extra = nn.Linear(WIDTH + 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.extra(self.model(x))


def with_more_rows(*, src: dict[str, Tensor], dst: nn.Module) -> None:
    state = dst.state_dict()
    for name, value in src.items():
        target = state[f"model.{name}"]
        (target[: len(value)] if value.dim() else target).copy_(value)


def by_load_state_dict(*, src: dict[str, Tensor], dst: nn.Module) -> None:
    dst.load_state_dict(src)


def by_replacing_data(*, src: dict[str, Tensor], dst: nn.Module) -> None:
    for name, parameter in dst.named_parameters():
        parameter.data = src[name].to(parameter.dtype)


def resumed(directory: str, load: Callable[..., None], training: Training) -> list[dict[str, Tensor]]:
    results = []
    for stage in (0, 1, 2):
        engine = make_engine(training, stage)
        train(engine, 10, 11)
        engine.load_checkpoint(directory, custom_load_fn=load)
        train(engine, 2, 4)
        results.append(state_of(engine.module))
        engine.destroy()
    return results


@pytest.mark.parametrize("load", [by_load_state_dict, by_replacing_data])
@pytest.mark.parametrize("size", [1, 2])
def test_a_function_of_ones_own_loads_the_weights_and_training_goes_on(ranks, tmp_path, load, size):
    expected = ranks(2, saved, str(tmp_path), 2)[0]
    expected.pop("seen")
    for results in ranks(size, resumed, str(tmp_path), load, TRAINING):
        for weights in results:
            weights.pop("seen")
            assert_close(weights, expected, 1e-5)


def masters(engine) -> dict[str, Tensor]:
    trained = {name: p for name, p in engine.module.named_parameters() if p.requires_grad}
    return {name: safe_get_full_fp32_param(p) for name, p in trained.items()}


def from_fp32_to_bf16(directory: str, arguments: dict[str, Any], stage: int) -> list[dict[str, Tensor]]:
    full = make_engine(TRAINING, 1)
    train(full, 0, 2)
    full.save_checkpoint(directory)
    engine = make_engine(SIXTEEN_BIT, stage)
    engine.load_checkpoint(directory, **arguments)
    for name, parameter in engine.module.named_parameters():
        assert parameter.dtype == torch.bfloat16
        if parameter.requires_grad:
            assert torch.equal(parameter, safe_get_full_fp32_param(parameter).bfloat16()), name
    moments = [safe_get_full_optimizer_state(e.module.first.weight, "exp_avg") for e in (full, engine)]
    assert torch.equal(*moments)
    return [masters(full), masters(engine)]


@pytest.mark.parametrize("stage", [0, 2])
@pytest.mark.parametrize("arguments", [{}, {"custom_load_fn": by_load_state_dict}], ids=["plain", "custom"])
def test_a_bf16_engine_takes_the_weights_of_an_fp32_checkpoint_into_its_masters(ranks, tmp_path, arguments, stage):
    for full, sixteen in ranks(2, from_fp32_to_bf16, str(tmp_path), arguments, stage):
        assert_equal(sixteen, full)


def in_bf16(engine, first: int, last: int) -> None:
    for step in range(first, last):
        x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(step)).bfloat16()
        engine.backward(engine(x).float().square().mean())
        engine.step()


def from_bf16_to_fp32(directory: str) -> list[dict[str, Tensor]]:
    engine = make_engine(SIXTEEN_BIT, 2)
    in_bf16(engine, 0, 2)
    engine.save_checkpoint(directory)
    full = make_engine(TRAINING, 1)
    full.load_checkpoint(directory)
    assert all(p.dtype == torch.float32 for p in full.module.parameters())
    trained = {name: p.detach().clone() for name, p in full.module.named_parameters() if p.requires_grad}
    return [masters(engine), trained]


def test_an_fp32_engine_takes_the_masters_of_a_bf16_checkpoint(ranks, tmp_path):
    for sixteen, full in ranks(2, from_bf16_to_fp32, str(tmp_path)):
        assert_equal(full, sixteen)
        assert any(not torch.equal(value, value.bfloat16().float()) for value in full.values())


LARGER = Training(Larger, squared_output)


def into_a_larger_model(directory: str, stage: int) -> dict[str, Tensor]:
    engine = make_engine(LARGER, stage)
    engine.load_checkpoint(directory, custom_load_fn=with_more_rows, load_optimizer_states=False)
    train(engine, 2, 4)
    return state_of(engine.module)


def test_a_function_of_ones_own_fits_a_checkpoint_into_another_model(ranks, tmp_path):
    ranks(2, saved, str(tmp_path), 2)
    model = seeded_model(LARGER)
    weights = ranks(1, weights_of, str(tmp_path))[0]
    with torch.no_grad():
        with_more_rows(src=weights, dst=model)
    optimizer = sgd([p for p in model.parameters() if p.requires_grad])
    for step in (2, 3):
        x = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(step))
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for stage in (0, 1, 2):
        for found in ranks(2, into_a_larger_model, str(tmp_path), stage):
            assert_close(found, state_of(model))


def weights_of(directory: str) -> dict[str, Tensor]:
    engine = make_engine(TRAINING, 0)
    engine.load_checkpoint(directory)
    return state_of(engine.module)


def failing_on_rank_one(*, src: dict[str, Tensor], dst: nn.Module) -> None:
    dst.load_state_dict(src)
    if torch.distributed.get_rank() == 1:
        raise KeyError("lost")


def replacing_a_parameter(*, src: dict[str, Tensor], dst: nn.Module) -> None:
    dst.first.weight = nn.Parameter(src["first.weight"])


def refused(directory: str, load: Callable[..., None], stage: int) -> tuple[str, bool]:
    engine = make_engine(SIXTEEN_BIT, stage)
    in_bf16(engine, 0, 1)
    before, weight = masters(engine), engine.module.first.weight
    with pytest.raises((RuntimeError, KeyError)) as caught:
        engine.load_checkpoint(directory, custom_load_fn=load)
    engine.module.first.weight = weight
    same = all(torch.equal(value, before[name]) for name, value in masters(engine).items())
    in_bf16(engine, 1, 2)
    return str(caught.value), same and not torch.equal(before["last.bias"], masters(engine)["last.bias"])


@pytest.mark.parametrize("stage", [0, 2])
@pytest.mark.parametrize(
    ("load", "message"),
    [(failing_on_rank_one, "lost"), (replacing_a_parameter, "replaced or reshaped the parameter first.weight")],
)
def test_a_function_that_fails_is_named_on_every_rank_and_the_masters_stay(ranks, tmp_path, load, message, stage):
    ranks(2, saved, str(tmp_path), 2)
    for said, kept in ranks(2, refused, str(tmp_path), load, stage):
        assert message in said and kept


def without_optimizer_states(directory: str, stage: int) -> dict[str, Tensor]:
    engine = make_engine(TRAINING, stage)
    before = {name: value.clone() for name, value in engine.module.state_dict().items()}
    engine.load_checkpoint(directory, load_optimizer_states=False)
    assert engine.global_steps == 2 and not torch.equal(engine.module.first.weight, before["first.weight"])
    with pytest.raises(KeyError):
        safe_get_full_optimizer_state(engine.module.first.weight, "exp_avg")
    train(engine, 2, 4)
    return state_of(engine.module)


def test_without_optimizer_states_the_optimizer_starts_anew_from_the_weights(ranks, tmp_path):
    ranks(2, saved, str(tmp_path), 2)
    model = seeded_model(TRAINING)
    model.load_state_dict(ranks(1, weights_of, str(tmp_path))[0])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    rates = ranks(1, rates_after_two_steps)[0]
    for step, rate in zip((2, 3), rates, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        x = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(step))
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for stage in (0, 1, 2):
        for weights in ranks(2, without_optimizer_states, str(tmp_path), stage):
            assert_close(weights, state_of(model), 1e-5)


def rates_after_two_steps() -> list[float]:
    engine = make_engine(TRAINING, 0)
    train(engine, 0, 2)
    rates = []
    for step in (2, 3):
        rates.append(engine.get_lr()[0])
        train(engine, step, step + 1)
    return rates


ACCUMULATING = Training(Model, squared_output, accumulation=3, config=TRAINING.config)


@contextmanager
def lines_of_the_log():
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("DeepSpeed")
    logger.addHandler(handler)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)


def saved_in_the_midst(directory: str, stage: int) -> tuple[list[str], dict[str, Tensor]]:
    engine = make_engine(ACCUMULATING, stage)
    train(engine, 0, 3)
    train(engine, 3, 5)
    with lines_of_the_log() as lines:
        engine.save_checkpoint(directory)
    train(engine, 5, 9)
    return [line for line in lines if "not saved" in line], state_of(engine.module)


def resumed_after_the_midst(directory: str, stage: int) -> tuple[tuple[int, int], dict[str, Tensor]]:
    """The micro-batches of the step that was under way are given again."""
    engine = make_engine(ACCUMULATING, stage)
    train(engine, 20, 21)
    engine.load_checkpoint(directory)
    counters = engine.global_steps, engine.micro_steps
    train(engine, 3, 9)
    return counters, state_of(engine.module)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_save_in_the_midst_of_a_step_says_so_and_holds_the_state_before_it(ranks, tmp_path, stage):
    (said, expected), (said_there, _) = ranks(2, saved_in_the_midst, str(tmp_path), stage)
    assert len(said) == 1 and "the gradients of the last 2 micro-steps are not saved" in said[0] and said_there == []
    for counters, weights in ranks(2, resumed_after_the_midst, str(tmp_path), stage):
        assert counters == (1, 3)
        assert_close(weights, expected, 1e-5)


class Grown(Model):
    """The same model with a further layer, without one bias."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(WIDTH, WIDTH, bias=False)
        self.more = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.more(super().forward(x))


def into_a_grown_model(directory: str, stage: int) -> tuple[list[str], bool, bool]:
    engine = make_engine(Training(Grown, squared_output, config=TRAINING.config), stage)
    before = state_of(engine.module)
    with pytest.raises(RuntimeError, match=r"more.weight is missing there; .*last.bias is not in this model"):
        engine.load_checkpoint(directory)
    with lines_of_the_log() as lines:
        engine.load_checkpoint(directory, load_module_strict=False)
    after = state_of(engine.module)
    train(engine, 2, 4)
    same = torch.equal(after["more.weight"], before["more.weight"])
    return lines, same, torch.equal(after["first.weight"], before["first.weight"])


@pytest.mark.parametrize("stage", [1, 3])
def test_new_layers_keep_their_values_where_a_load_is_not_strict_and_what_differs_is_listed(ranks, tmp_path, stage):
    ranks(2, saved, str(tmp_path), 2)
    (lines, more_kept, first_kept), (others, _, _) = ranks(2, into_a_grown_model, str(tmp_path), stage)
    (line,) = [line for line in lines if "load_module_strict" in line]
    assert "missing there and left as they are: more.weight, more.bias; not in this model: last.bias" in line
    assert more_kept and not first_kept and others == []
