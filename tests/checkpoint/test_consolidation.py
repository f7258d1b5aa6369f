"""The whole fp32 weights of a checkpoint, wherever its parts were written."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from deepspeed.checkpoint.directory import CheckpointError
from deepspeed.checkpoint.weight_files import parse_size
from deepspeed.utils.zero_to_fp32 import (
    convert_zero_checkpoint_to_fp32_state_dict,
    get_fp32_state_dict_from_zero_checkpoint,
    get_model_state_file,
    get_optim_files,
    load_state_dict_from_zero_checkpoint,
)
from tests.engine.test_checkpointing import CLIENT, TRAINING, Model, flip_a_bit, train
from tests.parity import assert_close, assert_equal, make_engine, state_of

STAGES = (0, 1, 2, 3)


def saved(directory: str, stage: int, dtype: str, exclude_frozen_parameters: bool = False) -> dict[str, Tensor]:
    """What the model has when it is saved, but for the fp32 masters behind its 16-bit parameters."""
    config = {**TRAINING.config, "bf16": {"enabled": dtype == "bf16"}}
    engine = make_engine(TRAINING.__class__(Model, TRAINING.micro_step, config=config), stage)
    engine.module.seen.fill_(5)
    if dtype == "fp32":
        train(engine, 0, 2)
    engine.save_checkpoint(directory, client_state=CLIENT, exclude_frozen_parameters=exclude_frozen_parameters)
    return state_of(engine.module)


@pytest.mark.parametrize("stage", STAGES)
def test_the_state_dict_is_the_models_with_tied_weights_tied(ranks, tmp_path, stage):
    expected = ranks(2, saved, str(tmp_path), stage, "fp32")[0]
    state = get_fp32_state_dict_from_zero_checkpoint(tmp_path)
    assert_equal(state, expected)
    assert state["again.weight"] is state["first.weight"]
    named = get_fp32_state_dict_from_zero_checkpoint(str(tmp_path), tag="global_step2", exclude_frozen_parameters=True)
    assert expected.keys() - named.keys() == {"frozen.weight", "frozen.bias"}


def test_weights_of_a_16_bit_model_are_its_masters(ranks, tmp_path):
    trained = ranks(2, saved, str(tmp_path), 2, "bf16")[0]
    torch.manual_seed(3)
    given = Model().state_dict()
    state = get_fp32_state_dict_from_zero_checkpoint(tmp_path)
    assert {value.dtype for value in state.values()} == {torch.float32}
    assert torch.equal(state["first.weight"], given["first.weight"])
    assert torch.equal(state["frozen.weight"], trained["frozen.weight"].float())


def test_a_model_is_given_the_weights_and_keeps_what_the_checkpoint_leaves_out(ranks, tmp_path):
    expected = ranks(2, saved, str(tmp_path), 1, "fp32", True)[0]
    torch.manual_seed(11)
    model = Model()
    own = model.frozen.weight.clone()
    assert load_state_dict_from_zero_checkpoint(model, tmp_path) is model
    assert torch.equal(model.frozen.weight, own)
    assert_equal({n: v for n, v in state_of(model).items() if "frozen" not in n}, without_frozen(expected))


def without_frozen(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if "frozen" not in name}


@pytest.mark.parametrize("safe", [False, True], ids=["torch", "safetensors"])
def test_files_are_split_at_the_size_and_indexed(ranks, tmp_path, safe):
    expected = ranks(2, saved, str(tmp_path), 2, "fp32")[0]
    read = load_file if safe else torch.load
    convert_zero_checkpoint_to_fp32_state_dict(tmp_path, tmp_path / "one", safe_serialization=safe)
    (file,) = (tmp_path / "one").iterdir()
    assert file.name == ("model.safetensors" if safe else "pytorch_model.bin")
    assert_equal(read(file), expected)

    # A layer of 144 and 12 values in fp32 fits into 700 bytes.
    convert_zero_checkpoint_to_fp32_state_dict(tmp_path, tmp_path / "some", "0.7KB", safe_serialization=safe)
    (index_file,) = (tmp_path / "some").glob("*.json")
    index = json.loads(index_file.read_text())
    together = {}
    for name in sorted(set(index["weight_map"].values())):
        part = read(tmp_path / "some" / name)
        assert part.keys() == {key for key, home in index["weight_map"].items() if home == name}
        together.update(part)
    assert len(set(index["weight_map"].values())) == 3 and file.stem in index_file.name
    assert index["metadata"]["total_size"] == 3 * (144 + 12) * 4 + 4
    assert_close(together, expected, 0)


def test_the_script_beside_a_checkpoint_writes_its_weights(ranks, tmp_path):
    expected = ranks(2, saved, str(tmp_path), 1, "fp32")[0]
    script = tmp_path / "zero_to_fp32.py"
    assert script.stat().st_mode & 0o777 == 0o744
    command = [sys.executable, str(script), str(tmp_path), str(tmp_path / "out"), "--safe_serialization"]
    run = subprocess.run(command, cwd=tmp_path.parent, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    assert_equal(load_file(tmp_path / "out/model.safetensors"), expected)
    missing = subprocess.run([*command, "--tag", "global_step7"], capture_output=True, text=True, timeout=60)
    assert missing.returncode == 1
    assert "global_step7 does not exist" in missing.stderr and "Traceback" not in missing.stderr


def test_damage_and_missing_checkpoints_are_named(ranks, tmp_path):
    with pytest.raises(CheckpointError, match="has no file 'latest'"):
        get_fp32_state_dict_from_zero_checkpoint(tmp_path)
    ranks(2, saved, str(tmp_path), 2, "fp32")
    flip_a_bit(tmp_path / "global_step2")
    with pytest.raises(CheckpointError, match="the checksum of"):
        get_fp32_state_dict_from_zero_checkpoint(tmp_path)


def test_sizes_are_read_as_people_write_them():
    assert [parse_size(size) for size in (7, "7", "2KB", "1.5 gb", None)] == [7, 7, 2e3, 1.5e9, float("inf")]
    with pytest.raises(ValueError, match="'5 apples' is not a size"):
        parse_size("5 apples")


@pytest.mark.parametrize("stage", STAGES)
def test_small_states_are_given_as_files_of_torch(ranks, tmp_path, stage):
    ranks(2, saved, str(tmp_path), stage, "fp32")
    checkpoint = tmp_path / "global_step2"
    (optimizer,) = get_optim_files(checkpoint)
    states = torch.load(optimizer, weights_only=False)["optimizer_state_dict"]
    assert states == {"zero_stage": stage, "partition_count": 2}
    model = torch.load(get_model_state_file(checkpoint, stage), weights_only=False)
    assert torch.equal(model["random"], CLIENT["random"]) and model["pair"] == CLIENT["pair"]
    assert model["global_steps"] == 2 and model["dp_world_size"] == 2
    assert Path(optimizer).parent == checkpoint
