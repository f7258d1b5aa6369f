"""Running the examples of the documentation: Python and configurations on a rank of the pool, commands beside it."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

import deepspeed
from deepspeed.launcher import launch, plan, program
from deepspeed.launcher.runner import main as deepspeed_command
from tests.documentation.pages import ROOT, Block

STEPS = 5
BASE = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}, "zero_optimization": {"stage": 2}}
"""What a configuration on a page is added to, since most show one section."""


def run_python(blocks: Sequence[Block], folder: str) -> list[str]:
    """On a rank: run the blocks of a page in order; returns what each has printed."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    printed = []
    for block in blocks:
        code = compile("\n" * (block.line - 1) + block.text, block.page, "exec")
        printed.append(_printed(partial(exec, code, namespace), Path(folder)))
    return printed


def train_with(configuration: str, folder: str) -> str:
    """On a rank: train four linear layers with a page's configuration; returns what is printed."""
    return _printed(partial(_train, BASE | json.loads(configuration)), Path(folder))


def _train(configuration: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(512, 512) for _ in range(4)))
    engine = deepspeed.initialize(model=model, config=configuration)[0]
    while engine.global_steps < STEPS:
        batch = torch.randn(8, 512, dtype=next(engine.parameters()).dtype)
        engine.backward(engine(batch).float().square().mean())
        engine.step()
    engine.destroy()


def _printed(run: Callable[[], object], folder: Path) -> str:
    """Run in ``folder``; returns what this process has printed meanwhile, by any route."""
    here, streams = Path.cwd(), [os.dup(1), os.dup(2)]
    with tempfile.TemporaryFile("w+") as output:
        os.chdir(folder)
        for stream in (1, 2):
            os.dup2(output.fileno(), stream)
        try:
            run()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for stream, saved in zip((1, 2), streams, strict=True):
                os.dup2(saved, stream)
                os.close(saved)
            os.chdir(here)
        output.seek(0)
        return output.read()


def run_script(script: str, folder: Path) -> str:
    """Run a block for bash in ``folder``; returns what it prints. Raises AssertionError where a command fails."""
    variables = {key: value for key, value in os.environ.items() if key != "RANK"}
    variables["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{variables['PATH']}"
    run = subprocess.run(
        ["bash", "-e", "-c", script],
        cwd=folder,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=100,
    )
    assert run.returncode == 0, run.stdout
    return run.stdout


def plan_commands(script: str, monkeypatch: Any) -> None:
    """Plan each command, as on a machine of eight accelerators and 16 cores. Raises AssertionError where it is refused."""
    for module in (launch, plan):
        monkeypatch.setattr(module, "accelerator_count", lambda: 8)
    for module in (program, plan):
        monkeypatch.setattr(module, "available_cores", lambda: list(range(16)))
    for line in script.splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["make"]:
            _plan_make(words[1:], monkeypatch)
        elif words:
            _plan(words)


def _plan(words: list[str]) -> None:
    assert words[0] == "deepspeed", f"cannot plan {shlex.join(words)}: only deepspeed and make can be"
    assert deepspeed_command(["--dry_run", *words[1:]]) == 0, f"{shlex.join(words)} is refused"


def _plan_make(targets: list[str], monkeypatch: Any) -> None:
    monkeypatch.chdir(ROOT)
    run = subprocess.run(["make", "--dry-run", *targets], capture_output=True, text=True, timeout=20)
    assert run.returncode == 0, run.stderr
    for line in run.stdout.splitlines():
        words = shlex.split(line)
        if Path(words[0]).name == "deepspeed":
            _plan(["deepspeed", *words[1:]])
