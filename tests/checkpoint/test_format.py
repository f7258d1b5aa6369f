"""The page on the format, taken at its word: a checkpoint read by its example, with JSON, safetensors and NumPy alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from deepspeed.utils import safe_get_full_optimizer_state
from tests.documentation.pages import ROOT, Page
from tests.engine.test_checkpointing import CLIENT, TRAINING, train
from tests.parity import make_engine, state_of

PAGE = Page.read(ROOT / "docs" / "checkpoint-format.md")


def saved(directory: str, stage: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    engine = make_engine(TRAINING, stage)
    train(engine, 0, 2)
    engine.save_checkpoint(directory, client_state=CLIENT)
    trained = [(name, p) for name, p in engine.module.named_parameters() if p.requires_grad]
    return state_of(engine.module), {name: safe_get_full_optimizer_state(p, "exp_avg") for name, p in trained}


@pytest.mark.parametrize("stage", [1, 3])
def test_another_program_reads_a_checkpoint_by_the_page_alone(ranks, tmp_path, stage):
    weights, moments = ranks(2, saved, str(tmp_path), stage)[0]
    names: dict = {}
    exec(PAGE.running("python")[0].text, names)
    checkpoint = tmp_path / (tmp_path / "latest").read_text()
    for expected, kind in ((weights, "weight"), (moments, "exp_avg")):
        found = names["read_tensors"](checkpoint, kind)
        assert found.keys() >= expected.keys()
        assert all(torch.equal(torch.from_numpy(found[name]), value) for name, value in expected.items())
    assert found["again.weight"] is found["first.weight"]


def keys_of_the_page() -> set[str]:
    table = PAGE.text.split("## The index")[1].split("\n\n")[1]
    return {name.strip("` ") for row in table.splitlines()[2:] for name in row.split("|")[1].split(",")}


def test_the_page_names_what_an_index_has(ranks, tmp_path):
    ranks(2, saved, str(tmp_path), 1)
    index = json.loads((tmp_path / "global_step2" / "index.json").read_text())
    assert index.keys() == keys_of_the_page()
    assert len(index["rank_states"]) == 2 and index["tied"] == {
        "again.weight": "first.weight",
        "again.bias": "first.bias",
    }
    assert sorted(path.name for path in Path(tmp_path, "global_step2").iterdir()) == ["index.json", *index["files"]]
