"""Checkpoints of the original DeepSpeed: read as they are, and written so. The archives were saved by its version 0.19.8 after
four steps of `Model` on two gloo ranks; the losses are those of its own steps after loading them."""

from __future__ import annotations

import os
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import deepspeed
from deepspeed.checkpoint.directory import CheckpointError
from deepspeed.checkpoint.foreign.matching import names_of_states
from deepspeed.checkpoint.foreign.pickles import load_pickle
from deepspeed.checkpoint.inspection import difference
from deepspeed.checkpoint.opening import open_source
from deepspeed.utils.zero_to_fp32 import get_model_state_file, get_optim_files
from tests.engine.test_checkpointing import TRAINING, train
from tests.parity import assert_close, generator, make_engine, state_of

ARCHIVES = Path(__file__).parents[2] / "fixtures" / "original_checkpoints"
LOSSES = {
    "stage_0_bf16": [1.751463, 1.718067, 1.589814, 1.902465],
    "stage_1_bf16": [1.7491, 1.7211, 1.591394, 1.899516],
    "stage_3_fp32": [1.749261, 1.719447, 1.590349, 1.898693],
}
WIDTH = 12


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.first = nn.Linear(WIDTH, 2 * WIDTH)
        self.last = nn.Linear(2 * WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.again = self.first
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.last(torch.tanh(self.again(self.frozen(x)))))


def unpacked(name: str, folder: Path) -> Path:
    with tarfile.open(ARCHIVES / f"{name}.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


def resumed(directory: str, stage: int, bf16: bool) -> tuple[list[float], object, int]:
    model = Model()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in trained if p.dim() == 1], "weight_decay": 0.0},
    ]
    schedule = {"warmup_min_lr": 0.001, "warmup_max_lr": 0.01, "warmup_num_steps": 6, "warmup_type": "linear"}
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}},
        "scheduler": {"type": "WarmupLR", "params": schedule},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "gradient_clipping": 1.0,
        "bf16": {"enabled": bf16},
    }
    engine = deepspeed.initialize(model=model, model_parameters=groups, config=config)[0]
    _, client_state = engine.load_checkpoint(directory)
    losses = []
    for step in range(4, 8):
        seeded = generator(step)
        x, y = (torch.randn(8, WIDTH, generator=seeded).chunk(2)[engine.communicator.rank] for _ in range(2))
        loss = (engine(x.bfloat16() if bf16 else x).float() - y).square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    engine.destroy()
    return losses, client_state, engine.global_steps


@pytest.mark.parametrize(("name", "stage"), [("stage_0_bf16", 0), ("stage_1_bf16", 2), ("stage_3_fp32", 1)])
def test_training_goes_on_along_the_originals_losses(ranks, tmp_path, name, stage):
    directory = str(unpacked(name, tmp_path))
    found = ranks(2, resumed, directory, stage, "bf16" in name)
    losses = (torch.tensor(found[0][0]) + torch.tensor(found[1][0])) / 2
    torch.testing.assert_close(losses, torch.tensor(LOSSES[name]), rtol=0, atol=2e-3 if "bf16" in name else 2e-6)
    assert found[0][1] == {"epoch": 7, "pair": (1, [2.5])} and found[0][2] == 8


def test_parts_with_padding_are_those_of_the_universal_layout(tmp_path):
    folder = unpacked("odd_stage_3_fp32", tmp_path)
    with open_source(folder / "global_step4") as source, open_source(folder / "global_step4_universal") as universal:
        assert difference(source, universal) == []
        assert source.names["again.weight"] == "first.weight"
        assert source.shapes["first.weight"] == (26, 13) and source.kinds("norm.bias") == {"weight", "exp_avg", "exp_avg_sq"}


def saved(directory: str, stage: int, bf16: bool) -> dict[str, Tensor]:
    config = {**TRAINING.config, "bf16": {"enabled": bf16}, "checkpoint": {"format": "deepspeed"}}
    engine = make_engine(TRAINING.__class__(TRAINING.make_model, TRAINING.micro_step, config=config), stage)
    engine.module.seen.fill_(5)
    if not bf16:
        train(engine, 0, 2)
    engine.save_checkpoint(directory, tag="global_step2", client_state={"epoch": 7})
    if not bf16:
        train(engine, 2, 4)
    return state_of(engine.module)


def went_on(directory: str) -> tuple[dict[str, Tensor], object]:
    engine = make_engine(TRAINING, 1)
    _, client_state = engine.load_checkpoint(directory)
    train(engine, 2, 4)
    return state_of(engine.module), client_state


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_what_is_saved_in_the_originals_layout_is_loaded_at_any_world_size_and_stage(ranks, tmp_path, stage):
    expected = ranks(2, saved, str(tmp_path), stage, False)[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["global_step2", "latest", "zero_to_fp32.py"]
    for size in (1, 2):
        weights, client_state = ranks(size, went_on, str(tmp_path))[0]
        assert_close(weights, expected, 1e-5)
        assert client_state == {"epoch": 7}


def test_files_are_named_as_the_original_names_them_and_found_by_those_who_ask(ranks, tmp_path):
    for stage in (1, 3):
        ranks(2, saved, str(tmp_path / str(stage)), stage, True)
    names = {stage: sorted(path.name for path in (tmp_path / stage / "global_step2").iterdir()) for stage in ("1", "3")}
    optimizers = [f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in (0, 1)]
    assert names["1"] == [*optimizers, "mp_rank_00_model_states.pt"]
    assert names["3"] == [*optimizers, *(f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" for rank in (0, 1))]
    folder = tmp_path / "3" / "global_step2"
    assert [Path(file).name for file in get_optim_files(folder)] == optimizers
    assert Path(get_model_state_file(folder, 3)).name == names["3"][2]
    state = load_pickle(tmp_path / "1" / "global_step2" / optimizers[0])["optimizer_state_dict"]
    assert state["clip_grad"] == 0
    assert int(state["zero_stage"]) == 1 and state["partition_count"] == [2]


class Harmful:
    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, ("harm",)


def test_objects_that_are_not_data_are_refused_and_nothing_of_them_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = unpacked("stage_1_bf16", tmp_path) / "global_step4"
    file = folder / "mp_rank_00_model_states.pt"
    torch.save({**load_pickle(file), "harm": Harmful()}, tmp_path / "changed.pt")
    (tmp_path / "changed.pt").rename(file)
    with pytest.raises(CheckpointError, match=r"mp_rank_00_model_states.pt has objects that are not data.*mkdir"):
        open_source(folder)
    assert not Path("harm").exists()


def test_missing_and_damaged_files_are_named(tmp_path):
    folder = unpacked("stage_1_bf16", tmp_path) / "global_step4"
    file = folder / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
    content = bytearray(file.read_bytes())
    with zipfile.ZipFile(file) as archive:
        entry = max(archive.infolist(), key=lambda entry: entry.file_size if "/data/" in entry.filename else 0)
    content[entry.header_offset + 400] ^= 1
    file.write_bytes(content)
    with open_source(folder) as source, pytest.raises(CheckpointError, match=r"rank_1.*is damaged: the checksum of"):
        source.verify(["any"])
    file.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"rank_1_mp_rank_00_optim_states.pt is missing or damaged"):
        open_source(folder)
    file.unlink()
    with pytest.raises(CheckpointError, match="files of 1 optimizers and 1 models, and was saved at stage 1 by 2 ranks"):
        open_source(folder)


def test_numbered_states_get_names_where_shapes_leave_one_way_and_are_refused_otherwise():
    named = {"a": (2, 2), "b": (3,), "c": (2, 2), "d": (3,)}
    both = names_of_states([[0, 1], [2, 3]], {0: (2, 2), 1: (2, 2), 2: (3,), 3: (3,)}, named, Path("x"))
    assert both == {0: "a", 1: "c", 2: "b", 3: "d"}
    for shapes in ({0: (2, 2)}, {0: (4,)}):
        with pytest.raises(CheckpointError, match="does not say which parameters"):
            names_of_states([[0]], shapes, named, Path("x"))
