from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import deepspeed
from tests.engine.test_engine import batch, ds_config, make_model, train


class Tied(nn.Module):
    """A tied weight and a frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.frozen = nn.Linear(16, 16).requires_grad_(False)
        self.first = nn.Linear(16, 16)
        self.last = nn.Linear(16, 16, bias=False)
        self.last.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.first(self.frozen(x))))


def tied_engine(**more: object) -> deepspeed.DeepSpeedEngine:
    return deepspeed.initialize(model=Tied(), config=ds_config(2, **more))[0]


def consolidated() -> tuple[bool, bool, list[str], list[str]] | None:
    engine = tied_engine(bf16={"enabled": True})
    train(engine, 0, 1)
    state = engine._zero3_consolidated_16bit_state_dict()
    trained = engine._consolidated_16bit_state_dict(exclude_frozen_parameters=True)
    if state is None:
        assert trained is None
        return None
    equal = all(torch.equal(state[name], value) for name, value in engine.module.state_dict().items())
    tied = state["first.weight"].data_ptr() == state["last.weight"].data_ptr()
    assert state["first.weight"].untyped_storage().nbytes() == 2 * 16 * 16
    return equal, tied, list(state), list(trained)


def test_the_first_rank_gets_the_whole_model_with_tied_weights_shared(ranks):
    first, second = ranks(2, consolidated)
    assert second is None
    assert first == (
        True,
        True,
        ["frozen.weight", "frozen.bias", "first.weight", "first.bias", "last.weight"],
        ["first.weight", "first.bias", "last.weight"],
    )


def save_weights(directory: str, name: str) -> dict[str, torch.Tensor]:
    engine = tied_engine()
    train(engine, 0, 1)
    assert engine.save_16bit_model(f"{directory}/new", name)
    return {key: value.detach().clone() for key, value in engine.module.state_dict().items()}


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_saved_weights_are_read_by_other_libraries(ranks, tmp_path, name):
    expected = ranks(2, save_weights, str(tmp_path), name)[0]
    file = tmp_path / "new" / name
    state = load_file(file) if name.endswith("safetensors") else torch.load(file, weights_only=True)
    model = Tied()
    model.load_state_dict(state)
    for key, value in model.state_dict().items():
        assert torch.equal(value, expected[key])
    assert [path.name for path in file.parent.iterdir()] == [name]


def save_in_parts(directory: str) -> tuple[bool, dict[str, torch.Tensor]]:
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_gather_16bit_weights_on_model_save": True}
    engine = deepspeed.initialize(model=Tied(), config=ds_config(3, zero_optimization=zero))[0]
    train(engine, 0, 1)
    fetched = []
    for unit in engine.sharded_model.scopes.fetcher.units:
        hold = unit.hold
        unit.hold = lambda unit=unit, hold=hold: (hold(), fetched.append([u.holds for u in units]))
    units = engine.sharded_model.scopes.fetcher.units
    engine.save_16bit_model(directory, "model.safetensors", max_shard_size=1100)
    alone = all(sum(held) == 1 for held in fetched) and len(fetched) == len(units) > 0
    with deepspeed.zero.GatheredParameters(engine.module):
        return alone, {name: value.clone() for name, value in engine.module.state_dict().items()}


def test_a_sharded_model_is_written_unit_by_unit_in_files_with_an_index(ranks, tmp_path):
    (alone, expected), (also, _) = ranks(2, save_in_parts, str(tmp_path))
    assert alone and also
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = {name: load_file(tmp_path / name) for name in set(index["weight_map"].values())}
    assert len(files) > 1 and index["weight_map"].keys() == expected.keys()
    for name, file in index["weight_map"].items():
        assert torch.equal(files[file][name], expected[name])


def save_into_a_file(directory: str) -> str:
    engine = tied_engine()
    Path(directory, "taken").touch()
    with pytest.raises(RuntimeError) as caught:
        engine.save_16bit_model(f"{directory}/taken")
    return str(caught.value)


def test_weights_that_cannot_be_written_raise_on_every_rank(ranks, tmp_path):
    for message in ranks(2, save_into_a_file, str(tmp_path)):
        assert "pytorch_model.bin failed on rank 0" in message


def without_frozen(directory: str) -> tuple[bool, bool, int]:
    engine = tied_engine()
    train(engine, 0, 2)
    engine.save_checkpoint(directory, exclude_frozen_parameters=True)
    other = tied_engine()
    with torch.no_grad():
        other.module.frozen.weight.fill_(7.0)
    other.load_checkpoint(directory)
    return (
        bool((other.module.frozen.weight == 7.0).all()),
        torch.equal(other.module.first.weight, engine.module.first.weight),
        other.global_steps,
    )


def test_a_checkpoint_without_frozen_parameters_leaves_the_models_own(ranks, tmp_path):
    assert ranks(2, without_frozen, str(tmp_path)) == [(True, True, 2)] * 2
    stored = {name for file in (tmp_path / "global_step2").glob("*.safetensors") for name in load_file(file)}
    assert any("first.weight" in name for name in stored) and not any("frozen" in name for name in stored)


def module_only(directory: str) -> tuple[int, bool]:
    engine = tied_engine()
    train(engine, 0, 2)
    engine.save_checkpoint(directory)
    other = tied_engine()
    other.load_checkpoint(directory, load_module_only=True)
    return other.global_steps, torch.equal(other.module.first.weight, engine.module.first.weight)


def test_loading_the_module_only_leaves_the_counters(ranks, tmp_path):
    assert ranks(2, module_only, str(tmp_path)) == [(0, True)] * 2


def own_state_dict() -> bool:
    engine = deepspeed.initialize(model=make_model(), config=ds_config(1, bf16={"enabled": True}))[0]
    train(engine, 0, 1)
    for state in (engine.state_dict(), engine.module.state_dict()):
        kept = {name: value.clone() for name, value in state.items()}
        train(engine, 1, 2)
        engine.load_state_dict(kept)
        assert all(torch.equal(value, kept[name]) for name, value in kept.items())
    lr = engine.optimizer.param_groups[0]
    lr["lr"] = 0.0
    before = engine.module[0].weight.detach().clone()
    engine.backward(engine(batch(0).bfloat16()).float().square().mean())
    engine.step()
    return torch.equal(before, engine.module[0].weight)


def test_an_engine_loads_its_own_and_its_modules_state_dict_with_masters_following(ranks):
    assert ranks(2, own_state_dict) == [True, True]
