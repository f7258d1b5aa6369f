from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from deepspeed.cli.config import main
from deepspeed.config.reference import reference
from deepspeed.config.schema import json_schema
from deepspeed.launcher.runner import main as deepspeed

EXAMPLE = Path(__file__).parents[2] / "examples" / "train_lm" / "ds_config.json"


def explained(capsys: pytest.CaptureFixture[str], config: object, *more: str) -> dict[str, str]:
    """What follows each key (dotted) in the output."""
    assert main(["explain", config if isinstance(config, str) else json.dumps(config), *more]) == 0
    found, section = {}, ""
    for line in filter(str.strip, capsys.readouterr().out.splitlines()):
        name, *rest = line.split(maxsplit=1)
        if not rest:
            section = name
        else:
            found[f"{section}.{name}" if line.startswith(" ") else name] = " ".join(rest[0].split())
    return found


def test_a_file_is_explained_with_every_value_and_its_origin(capsys):
    found = explained(capsys, str(EXAMPLE), "--world_size", "2")
    assert found["ds_config.json,"] == "2 data-parallel ranks"
    assert found["train_batch_size"] == "8 samples 4 x 1 x 2 data-parallel ranks"
    assert found["train_micro_batch_size_per_gpu"] == "4 samples ds_config.json"
    assert found["zero_optimization.stage"] == "2 ds_config.json"
    assert found["zero_optimization.reduce_bucket_size"] == "4194304 elements default"


def test_arguments_of_the_optimizer_and_the_schedule_are_explained_with_their_defaults(capsys):
    config = {
        "optimizer": {"type": "adamw", "params": {"lr": "3e-4", "eps": "auto"}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": "auto"}},
    }
    found = explained(capsys, config)
    assert found["optimizer.params.lr"] == "0.0003 given"
    assert found["optimizer.params.eps"] == "1e-08 auto: default"
    assert found["optimizer.params.weight_decay"] == "0.01 default"
    assert found["scheduler.params.warmup_max_lr"] == "0.0003 auto: from optimizer.params.lr"
    assert found["scheduler.params.warmup_num_steps"] == "1000 default"


def test_deprecated_names_and_keys_without_effect_say_so(capsys):
    found = explained(capsys, {"bfloat16": {"enabled": True}, "zero_optimization": {"stage3_max_live_parameters": 7}})
    assert found["bf16.enabled"] == "true given as bfloat16 (deprecated)"
    assert found["zero_optimization.stage3_max_live_parameters"] == "7 elements given, no effect: only stage 3 reads it"
    assert "zero_optimization.stage3_max_reuse_distance" not in found
    assert "zero_optimization.stage3_max_reuse_distance" in explained(capsys, {}, "--all")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"zero_optimization": {"stge": 2}}, "zero_optimization.stge: unknown key; did you mean 'stage'?"),
        ({"train_batch_size": 7}, "not a multiple of gradient_accumulation_steps 1 x 2 data-parallel ranks = 2"),
        ({"optimizer": {"type": "Adan"}}, "optimizer.type 'Adan' is unknown. Did you mean 'Adam'?"),
        ({"optimizer": {"type": "Adam", "params": {"beta": 1}}}, "optimizer.params.beta is not an argument of Adam. Did you"),
        ({"scheduler": {"type": "WarmupDecayLR"}}, "scheduler.params lacks total_num_steps"),
        ("no_such_file.json", "neither an existing file"),
        ('{"a": 1,}', "this is not JSON"),
    ],
)
def test_bad_input_ends_with_code_2_and_the_error(capsys, config, message):
    text = config if isinstance(config, str) else json.dumps(config)
    assert main(["explain", text, "--world_size", "2"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("deepspeed config: error: ") and message in captured.err


@pytest.mark.parametrize(
    ("argv", "message"), [([], "COMMAND"), (["explian"], "invalid choice"), (["explain", "x", "--world_size", "0"], "found 0")]
)
def test_a_wrong_command_line_ends_with_code_2(capsys, argv, message):
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_the_schema_and_the_reference_page_are_printed(capsys):
    assert main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out) == json_schema()
    assert main(["reference"]) == 0
    assert capsys.readouterr().out == reference()


def test_the_deepspeed_command_hands_over_its_first_argument_alone(capsys, tmp_path, monkeypatch):
    assert deepspeed(["config", "explain", str(EXAMPLE)]) == 0
    assert "train_batch_size" in capsys.readouterr().out
    monkeypatch.chdir(tmp_path)
    Path("config").write_text("raise SystemExit(0)")
    assert deepspeed(["--dry_run", "--num_gpus", "1", "./config"]) == 0
    assert "./config" in capsys.readouterr().out


def test_a_reader_that_stops_early_is_no_error():
    command = f"{sys.executable} -m deepspeed config schema | head -c 10"
    result = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, env=os.environ, timeout=60
    )
    assert "Traceback" not in result.stderr and "BrokenPipe" not in result.stderr
