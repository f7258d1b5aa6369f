"""Programs whose states are on a disk, and what is left when one of their ranks comes to grief in the middle of a step."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import deepspeed

PROGRAM = """
import os, resource, shutil, signal, sys
from pathlib import Path
import torch
import deepspeed
how, folder = sys.argv[1:]
torch.set_num_threads(1)
torch.manual_seed(0)
model = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(3)))
disk = {"device": "nvme", "nvme_path": folder + "/nvme"}
zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
zero |= {"offload_param": {**disk, "max_in_cpu": 0}, "offload_optimizer": disk}
config = {"train_micro_batch_size_per_gpu": 2, "optimizer": {"type": "Adam"}, "zero_optimization": zero}
engine = deepspeed.initialize(model=model, config=config)[0]
stepping, steps = engine.optimizer.optimizer, []
step_shard = stepping.step_shard
def counted(*arguments, **keywords):
    steps.append(how)
    if len(steps) == 8 and engine.global_rank == 1:  # the second of three chunks, in the third step
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "full":
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    if how == "removed" and len(steps) == 4:
        shutil.rmtree(folder + "/nvme", ignore_errors=True)
    step_shard(*arguments, **keywords)
stepping.step_shard = counted
for step in range(4):
    engine.backward(engine(torch.ones(2, 64)).square().mean())
    engine.step()
    if step == 0:
        engine.save_checkpoint(folder, tag="good")
print("finished", len(steps))
"""


def run_two_ranks(folder: Path, how: str) -> list[tuple[int, str]]:
    """Of each rank: its exit code and what it said."""
    program = folder / "train.py"
    program.write_text(PROGRAM)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    common = {**os.environ, "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "DS_ACCELERATOR": "cpu"}
    running = []
    for rank in range(2):
        environment = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        command = [sys.executable, str(program), how, str(folder)]
        running.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    try:
        said = [process.communicate(timeout=100)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    return [(p.returncode, text) for p, text in zip(running, said, strict=True)]


@pytest.mark.parametrize("how", ["killed", "full"])
def test_a_fault_in_the_middle_of_a_step_is_an_error_on_all_ranks_and_leaves_the_checkpoint(tmp_path, how):
    (first, said), (second, said_by_second) = run_two_ranks(tmp_path, how)
    assert first == 1 and "CollectiveError: " in said and "rank 1" in said
    if how == "killed":
        assert second == -9
    else:
        assert second == 1 and "FileTransferError: writing" in said_by_second and "allows no larger file" in said_by_second
    assert not list((tmp_path / "nvme").iterdir())
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(3)))
    config = {"train_micro_batch_size_per_gpu": 2, "optimizer": {"type": "Adam"}, "zero_optimization": {"stage": 1}}
    engine = deepspeed.initialize(model=model, config=config)[0]
    engine.load_checkpoint(str(tmp_path))
    assert engine.global_steps == 1 and all(bool(p.isfinite().all()) for p in model.parameters())
    engine.backward(engine(torch.ones(2, 64)).square().mean())
    engine.step()
    engine.destroy()


def test_a_directory_that_is_removed_meanwhile_does_no_harm(tmp_path):
    for code, said in run_two_ranks(tmp_path, "removed"):
        assert code == 0 and "finished 12" in said
    assert not (tmp_path / "nvme").exists()
