from __future__ import annotations

import json
from pathlib import Path

import pytest

from deepspeed.cli.plan import nbytes
from deepspeed.cli.plan_model import decoder_shape
from deepspeed.config import load_config
from deepspeed.launcher.runner import main

RATES = ["--flops", "1e10", "--memory-rate", "8GB", "--disk-rate", "1GB", "--base", "300MB"]
SMALL = ["plan", "--model", "20M", "--context", "32", "--checkpointing", "off", *RATES]


def rows(output: str) -> list[list[str]]:
    return [line.split() for line in output.splitlines() if " GB " in line and "memory of" not in line]


def test_where_all_fits_nothing_goes_to_the_disk(tmp_path: Path, capsys) -> None:
    file = tmp_path / "ds_config.json"
    assert main([*SMALL, "--memory", "24GB", "--disk", "80GB", "--write", str(file)]) == 0
    printed = capsys.readouterr().out
    assert len(rows(printed)) == 8 and rows(printed)[0][0] == "best" and str(file) in printed
    config = load_config(str(file), world_size=1)
    assert config.zero_optimization.stage == 0 and not config.zero_optimization.offloads_optimizer


def test_with_less_memory_the_states_go_to_the_disk_and_the_configuration_says_so(capsys) -> None:
    assert main([*SMALL, "--memory", "490MB", "--disk", "1GB", "--gpus", "2", "--precision", "bf16"]) == 0
    printed = capsys.readouterr().out
    best = next(row for row in rows(printed) if row[0] == "best")
    config = load_config("{" + printed.partition("{")[2].rpartition("}")[0] + "}", world_size=2)
    assert config.zero_optimization.stage == int(best[1]) >= 1
    assert config.zero_optimization.offload_optimizer.device == "nvme" and config.bf16.enabled
    assert "communication is not counted" in printed
    assert all(row[-2:] == ["no:", "memory"] for row in rows(printed)[:5])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--memory", "400MB"], ["a disk: give --disk", "there are 0.40"]),
        (["--memory", "650MB", "--disk", "10MB"], ["a disk of 0.", "there are 0.01"]),
        (["--memory", "1GB", "--micro-batch", "64", "--context", "512"], ["a smaller --micro-batch", "checkpointing of activ"]),
    ],
)
def test_what_cannot_fit_is_refused_with_the_arithmetic_and_what_would_help(arguments, said, capsys) -> None:
    assert main([*SMALL, *arguments]) == 1
    errors = capsys.readouterr().err
    assert "nothing fits" in errors and "of Python and libraries" in errors
    for text in said:
        assert text in errors


def test_a_configuration_of_transformers_is_read(tmp_path: Path, capsys) -> None:
    pytest.importorskip("transformers")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 500}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "num_key_value_heads": 4, **sizes}))
    assert main(["plan", "--model", str(tmp_path), "--context", "16", "--memory", "2GB", *RATES]) == 0
    attention, feed, norms = 4 * 64 * 64, 3 * 64 * 128, 2 * 64
    assert f"{(2 * 500 * 64 + 2 * (attention + feed + norms) + 64) / 1e9:.3f} G parameters" in capsys.readouterr().out


def test_bad_input_is_an_error_and_no_traceback(tmp_path: Path, capsys) -> None:
    assert main(["plan", "--model", str(tmp_path / "missing"), "--memory", "1GB"]) == 2
    assert "neither a size" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["plan", "--model", "1B", "--memory", "much"])
    assert "expected bytes such as 24GB" in capsys.readouterr().err


def test_bytes_have_decimal_and_binary_units() -> None:
    assert [nbytes(text) for text in ("24GB", "24GiB", "500M", "1.5k", "7")] == [24_000_000_000, 24 << 30, 500_000_000, 1500, 7]


@pytest.mark.parametrize("size", [20e6, 350e6, 7e9, 70e9])
def test_the_assumed_shape_has_about_so_many_parameters(size: float) -> None:
    layers, width = decoder_shape(size)
    assert 12 * layers * width**2 + 2 * 32_000 * width == pytest.approx(size, rel=0.25)
