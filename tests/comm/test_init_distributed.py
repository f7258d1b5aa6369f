from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import deepspeed

SOURCE = Path(__file__).parent.parent.parent / "src"

LEAVES_A_THREAD_LIST = """
import atexit, os
def threads():
    return {open(f"/proc/self/task/{task}/comm").read().strip() for task in os.listdir("/proc/self/task")}
atexit.register(lambda: print("at the end:", *sorted(threads())))
import torch, deepspeed
import torch.distributed as dist
deepspeed.init_distributed()
torch.optim.SGD([torch.zeros(1)])
dist.barrier()
print("meanwhile:", *sorted(threads()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the names of threads from /proc")
def test_no_thread_of_gloo_is_left_when_the_interpreter_is_torn_down():
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-c", LEAVES_A_THREAD_LIST]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=True)
    meanwhile, end = result.stdout.splitlines()
    assert "pt_gloo_runloop" in meanwhile
    assert "gloo" not in end


def test_a_group_that_has_to_be_there_already_and_is_not_is_an_error():
    with pytest.raises(RuntimeError, match="there is no process group"):
        deepspeed.init_distributed("gloo", dist_init_required=False)
