"""States in fewer bytes: 8-bit optimizer states and split masters, at all stages, on disks and in checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import deepspeed
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from tests.engine.test_tiers import ADAM, EVERYTHING, SGD, Blocks, on_disk, step
from tests.parity import Training, assert_equal, make_engine, seeded_model, state_of, train_engine

SPLIT, EIGHT = {"split_master": True}, {"optimizer_state_bits": 8}
BOTH = {**SPLIT, **EIGHT}


def training(data_types: dict[str, object], zero: dict[str, object] | None = None, **more: object) -> Training:
    config = {"optimizer": ADAM, "bf16": {"enabled": True}, "gradient_clipping": 0.5, **more}
    return Training(Blocks, step, steps=4, config={**config, "data_types": data_types, "zero_optimization": zero or {}})


def same(first: Training, second: Training, stage: int, other_stage: int) -> None:
    expected, actual = train_engine(first, stage), train_engine(second, other_stage)
    assert_equal(actual.weights, expected.weights)
    assert actual.norms == expected.norms


@pytest.mark.parametrize("optimizer", [ADAM, SGD], ids=["AdamW", "SGD"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_split_master_trains_to_the_bits_of_an_ordinary_one(ranks, stage, optimizer):
    ranks(2, same, training({}, optimizer=optimizer), training(SPLIT, optimizer=optimizer), stage, stage)


@pytest.mark.parametrize(("stage", "sections"), [(2, EVERYTHING[:1]), (3, EVERYTHING[1:]), (3, EVERYTHING)], ids=str)
@pytest.mark.parametrize("data_types", [SPLIT, BOTH], ids=["split", "both"])
def test_packed_states_on_a_disk_train_to_the_same_bits(ranks, tmp_path, stage, sections, data_types):
    packed = training(data_types, on_disk(tmp_path, *sections))
    ranks(2, same, training({} if data_types is SPLIT else EIGHT), packed, stage, stage)


def test_8_bit_states_train_to_the_same_bits_at_every_sharded_stage(ranks):
    for stage in (2, 3):
        ranks(2, same, training(EIGHT), training(EIGHT), 1, stage)


def masters_and_moments(engine: deepspeed.DeepSpeedEngine) -> dict[str, torch.Tensor]:
    found = {}
    for name, parameter in engine.module.named_parameters():
        found[name] = safe_get_full_fp32_param(parameter)
        for key in ("exp_avg", "exp_avg_sq"):
            found[f"{name} {key}"] = safe_get_full_optimizer_state(parameter, key)
    return found


def saved(trained: Training, stage: int, folder: str) -> dict[str, torch.Tensor]:
    engine = make_engine(trained, stage)
    for index in range(2):
        step(engine, index * engine.communicator.size + engine.communicator.rank, engine.backward)
        engine.step()
    engine.save_checkpoint(folder)
    return masters_and_moments(engine)


def loaded(trained: Training, stage: int, folder: str) -> dict[str, torch.Tensor]:
    engine = make_engine(trained, stage)
    engine.load_checkpoint(folder)
    return masters_and_moments(engine)


@pytest.mark.parametrize(("before", "after"), [({}, SPLIT), (SPLIT, {}), (BOTH, {}), (BOTH, BOTH)], ids=str)
def test_a_checkpoint_loads_exactly_at_another_stage_and_world_size(ranks, tmp_path: Path, before, after):
    expected = ranks(2, saved, training(before), 2, str(tmp_path))[0]
    for size, stage in ((1, 0), (3, 3)):
        for values in ranks(size, loaded, training(after), stage, str(tmp_path)):
            assert_equal(values, expected)


def bytes_per_parameter(data_types: dict[str, object]) -> float:
    def make() -> torch.nn.Module:
        return torch.nn.Sequential(*(torch.nn.Linear(512, 512) for _ in range(4)))

    def micro_step(model: torch.nn.Module, index: int, backward: Any) -> None:
        backward(model(torch.ones(2, 512, dtype=torch.bfloat16)).float().square().mean())

    config = {"optimizer": ADAM, "bf16": {"enabled": True}, "data_types": data_types}
    engine = make_engine(Training(make, micro_step, config={**config, "zero_optimization": {"reduce_bucket_size": 300_000}}), 1)
    micro_step(engine, 0, engine.backward)
    engine.step()
    micro_step(engine, 0, engine.backward)
    here, numel = engine.model_state_bytes(), sum(p.numel() for p in engine.module.parameters())
    return (here.parameters + here.gradients + here.master + here.optimizer) / numel


def test_bf16_and_adam_take_8_bytes_per_parameter(ranks):
    for data_types, nbytes in (({}, 16), (SPLIT, 14), (EIGHT, 10), (BOTH, 8)):
        (found,) = ranks(1, bytes_per_parameter, data_types)
        assert nbytes <= found < 1.02 * nbytes, data_types


def test_8_bit_states_train_nearly_as_fp32_ones(ranks):
    (ours,), (plain,) = (ranks(1, train_engine, training(chosen), 1) for chosen in (EIGHT, {}))
    start = {name: value.float() for name, value in seeded_model(training({})).state_dict().items()}
    moved = torch.cat([(plain.weights[name].float() - start[name]).flatten() for name in start])
    apart = torch.cat([(plain.weights[name].float() - ours.weights[name].float()).flatten() for name in start])
    assert 0 < apart.norm() < 0.1 * moved.norm()


def refused(data_types: dict[str, object], config: dict[str, object]) -> str:
    with pytest.raises((ValueError, RuntimeError)) as error:
        make_engine(training(data_types, **config), 1).optimizer.state_dict()
    return str(error.value)


def test_what_cannot_be_packed_is_an_error(ranks):
    (found,) = ranks(1, refused, SPLIT, {"bf16": {"enabled": False}})
    assert "data_types.split_master: needs bf16.enabled" in found
    lamb = {"type": "Lamb", "params": {"lr": 0.1}}
    for data_types in (EIGHT, SPLIT):
        (found,) = ranks(1, refused, data_types, {"optimizer": lamb})
        assert "Lamb needs all its states at once, so they cannot be packed" in found
    (found,) = ranks(1, refused, EIGHT, {})
    assert "use save_checkpoint" in found


def test_parameters_written_and_read_by_hand_go_through_the_halves(ranks):
    ranks(1, written_by_hand)


def written_by_hand() -> None:
    engine = make_engine(training(SPLIT), 1)
    values = torch.randn(12, 12)
    parameter = engine.module.enter.weight
    deepspeed.utils.safe_set_full_fp32_param(parameter, values)
    assert torch.equal(safe_get_full_fp32_param(parameter), values)
    assert torch.equal(parameter, values.bfloat16())
    assert state_of(engine.module)["enter.weight"].dtype == torch.bfloat16
