"""What ``import deepspeed`` does not do."""

from __future__ import annotations

import subprocess
import sys

HEAVY = (
    *["pydantic", "rich", "matplotlib", "tensorboard", "wandb", "comet_ml", "transformers", "safetensors", "psutil"],
    *["torch.distributed.elastic", "torch._dynamo", "torch._inductor", "torch.utils.tensorboard", "numpy.testing"],
)

PROGRAM = """
import sys, threading
import torch
before, threads = set(sys.modules), threading.active_count()
import deepspeed
assert threading.active_count() == threads
import os
children = open(f"/proc/self/task/{os.getpid()}/children").read() if os.path.exists("/proc/self/task") else ""
assert not children.strip(), children
sys.__stdout__.write(" ".join(sorted(set(sys.modules) - before)))
"""


def run(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=100)


def test_importing_the_package_loads_nothing_heavy_starts_nothing_and_prints_nothing():
    done = run(PROGRAM)
    loaded = done.stdout.split()
    assert done.stderr == ""
    assert loaded and all(name.startswith(("deepspeed", "importlib")) or not name.startswith(HEAVY) for name in loaded)
    assert len(loaded) < 40, loaded


def test_the_names_that_integrations_touch_without_training_stay_light():
    done = run(
        "import sys, torch, deepspeed\n"
        "before = set(sys.modules)\n"
        "deepspeed.utils.logger, deepspeed.get_accelerator().current_device_name(), deepspeed.comm.is_initialized()\n"
        "print(*sorted(set(sys.modules) - before))"
    )
    assert not [name for name in done.stdout.split() if name.split(".")[0] in ("pydantic", "rich", "matplotlib")]
