from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from deepspeed.checkpoint.directory import CheckpointError
from deepspeed.checkpoint.opening import open_source, resolve
from deepspeed.launcher.runner import main
from tests.checkpoint.foreign.test_original import unpacked


def test_a_checkpoint_of_the_original_is_converted_and_back_without_a_difference(tmp_path, capsys):
    source, ours, back = unpacked("stage_1_bf16", tmp_path / "source"), tmp_path / "ours", tmp_path / "back"
    assert main(["convert", str(source), str(ours)]) == 0
    assert main(["convert", str(source), str(back), "--to", "deepspeed"]) == 0
    capsys.readouterr()
    for other in (ours, back):
        assert main(["inspect", str(source), "--diff", str(other)]) == 0
        assert capsys.readouterr().out == "no difference\n"
    with open_source(resolve(ours)) as source_of_ours:
        assert source_of_ours.client_state() == {"epoch": 7, "pair": (1, [2.5])}
    assert sorted(path.name for path in back.iterdir()) == ["global_step4", "latest", "zero_to_fp32.py"]


def test_inspect_says_what_it_is_and_the_size_of_each_group_and_finds_damage(tmp_path, capsys):
    folder = unpacked("stage_3_fp32", tmp_path)
    assert main(["inspect", str(folder)]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[0].endswith("global_step4: a checkpoint of the original DeepSpeed")
    assert {"after 4 optimizer steps; saved by 2 ranks", "optimizer AdamW at ZeRO stage 3", "schedule WarmupLR"} <= set(lines)
    assert {"0 weight float32 2 2,304", "1 exp_avg float32 4 240", "not trained weight float32 3 636"} <= set(lines)
    assert lines[-1] == "whole and verified"
    file = folder / "global_step4" / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    file.write_bytes(file.read_bytes()[:-2000])
    assert main(["inspect", str(folder)]) == 2
    assert "zero_pp_rank_1_mp_rank_00_optim_states.pt is missing or damaged" in capsys.readouterr().err


def test_weights_of_others_are_converted_and_what_differs_is_named(tmp_path, capsys):
    weights = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}
    for name, changed in (("one", {}), ("two", {"a": torch.arange(6.0).view(2, 3).index_fill(0, torch.tensor([1]), 9.0)})):
        (tmp_path / name).mkdir()
        save_file({**weights, **changed}, tmp_path / name / "model.safetensors")
    assert main(["convert", str(tmp_path / "one"), str(tmp_path / "ours")]) == 0
    with open_source(resolve(tmp_path / "ours")) as ours:
        assert torch.equal(ours.whole("a"), weights["a"]) and ours.whole("b").dtype == torch.bfloat16
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "ours"), "--diff", str(tmp_path / "two")]) == 1
    assert capsys.readouterr().out == "a: weight differs in 3 of 6 elements, by 6 at most\n"
    assert load_file(tmp_path / "one" / "model.safetensors").keys() == {"a", "b"}


def test_a_directory_that_is_no_checkpoint_is_refused_with_what_it_holds(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("")
    assert main(["inspect", str(tmp_path)]) == 2
    assert "is no checkpoint that is known here, and has no file 'latest'. It holds notes.txt." in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="is no directory"):
        resolve(Path(tmp_path / "missing"))
