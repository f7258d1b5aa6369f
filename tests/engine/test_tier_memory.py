"""Memory in flight of states on a disk: what the configuration allows, counted from live storages and from the process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from deepspeed.memory.tiers import FileTier
from deepspeed.native.files import File, FileTransfer
from tests.parity import Training, make_engine

WIDTH, LAYERS = 64, 6
WEIGHT = WIDTH * WIDTH
UNIT = 2 * WEIGHT


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        pairs = (nn.Sequential(nn.Linear(WIDTH, WIDTH, False), nn.Linear(WIDTH, WIDTH, False)) for _ in range(LAYERS))
        self.layers = nn.ModuleList(pairs)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).tanh()
        return x


def step(model: nn.Module, index: int, backward: Callable[..., object]) -> None:
    backward(model(torch.ones(2, WIDTH, dtype=torch.bfloat16)).float().square().mean())


NO_MORE: dict[str, Any] = {}


def on_disk(
    folder: Path, *, optimizer: dict[str, Any] = NO_MORE, parameters: dict[str, Any] = NO_MORE, **zero: Any
) -> Training:
    disk = {"device": "nvme", "nvme_path": str(folder)}
    section = {
        "stage3_param_persistence_threshold": 0,
        "stage3_max_reuse_distance": 0,
        "offload_optimizer": {**disk, **optimizer},
        "offload_param": {**disk, "max_in_cpu": 0, **parameters},
        **zero,
    }
    return Training(
        Layers, step, config={"optimizer": {"type": "AdamW"}, "bf16": {"enabled": True}, "zero_optimization": section}
    )


@dataclass
class Traced:
    """Of the third step: the most bytes of states that were in memory at once, chunks, and bytes moved; whole parameters at
    most, in elements; and bytes of parameters in memory at the end."""

    most: int = 0
    chunks: int = 0
    read: int = 0
    written: int = 0
    live_numel: int = 0
    kept: int = 0


def traced(training: Training) -> Traced:
    engine = make_engine(training, 3)
    optimizer, found, submit = engine.optimizer, Traced(), File._submit
    stepping, real = optimizer.optimizer, optimizer.optimizer.step_shard
    files: list[FileTier] = [optimizer.flat.tiers.states, optimizer.flat.tiers.parameters]

    def look() -> None:
        live = sum(evictable._storage.nbytes() for file in files for evictable in file._known.values())
        found.most = max(found.most, live)

    def step_shard(*arguments: Any, **keywords: Any) -> None:
        real(*arguments, **keywords)
        found.chunks += 1
        look()

    def counted(file: File, tensor: Tensor, offset: int, *, writing: bool) -> FileTransfer:
        found.written += tensor.nbytes if writing else 0
        found.read += 0 if writing else tensor.nbytes
        look()
        return submit(file, tensor, offset, writing=writing)

    for index in range(3):
        step(engine, index, engine.backward)
        if index < 2:
            engine.step()
    with mock.patch.object(stepping, "step_shard", step_shard), mock.patch.object(File, "_submit", counted):
        engine.step()
    found.live_numel = engine.sharded_model.scopes.fetcher.most_live_numel
    found.kept = engine.model_state_bytes().parameters
    engine.destroy()
    return found


@pytest.mark.parametrize(("pipeline", "at_once"), [(True, 3), (False, 1)])
def test_a_step_has_no_more_states_in_memory_than_its_buffers_and_moves_each_byte_once(ranks, tmp_path, pipeline, at_once):
    buffers = {"buffer_count": 4, "buffer_size": at_once * WEIGHT, "pipeline": pipeline}
    (found,) = ranks(1, traced, on_disk(tmp_path, optimizer=buffers))
    assert found.chunks == 2 * LAYERS, "a parameter each"
    assert (at_once - 1) * 16 * WEIGHT < found.most <= 4 * 4 * at_once * WEIGHT
    # Master and two moments of 4 bytes each, and the gradient of 2; the 16-bit parameter is only written.
    assert found.read == 14 * UNIT * LAYERS and found.written == 14 * UNIT * LAYERS


def test_chunks_are_no_larger_than_a_sub_group(ranks, tmp_path):
    for size, chunks in ((UNIT, LAYERS), (WEIGHT, 2 * LAYERS)):
        (found,) = ranks(1, traced, on_disk(tmp_path, sub_group_size=size))
        assert found.chunks == chunks


def test_units_are_read_ahead_into_as_many_elements_as_there_are_buffers_for(ranks, tmp_path):
    for count in (1, 3):
        (found,) = ranks(1, traced, on_disk(tmp_path, parameters={"buffer_count": count, "buffer_size": UNIT}))
        assert found.live_numel == (1 + count) * UNIT


def test_as_many_parameters_stay_in_memory_as_max_in_cpu_says(ranks, tmp_path):
    for limit, staying in ((0, 0), (5 * UNIT + 1, 5), (LAYERS * UNIT, LAYERS)):
        (found,) = ranks(1, traced, on_disk(tmp_path, parameters={"max_in_cpu": limit}))
        assert found.kept == staying * UNIT * 2


PROGRAM = """
import sys
from pathlib import Path
import torch
import deepspeed

def private():
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))

torch.set_num_threads(1)
disk = {"device": "nvme", "nvme_path": sys.argv[1]}
zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 1}
zero |= {"offload_param": {**disk, "max_in_cpu": 0}, "offload_optimizer": {**disk, "buffer_size": 1_800_000}}
config = {"train_micro_batch_size_per_gpu": 1, "optimizer": {"type": "Adam"}, "zero_optimization": zero}
deepspeed.initialize(model=torch.nn.Linear(8, 8), config={**config, "zero_optimization": {"stage": 3}})[0].destroy()
before = private()
peak = before
with deepspeed.zero.Init(config_dict_or_path=config):
    model = torch.nn.Sequential()
    for _ in range(24):
        model.append(torch.nn.Linear(768, 768, bias=False))
        peak = max(peak, private())
engine = deepspeed.initialize(model=model, config=config)[0]
peak, real = max(peak, private()), engine.optimizer.optimizer.step_shard

def step_shard(*arguments, **keywords):
    global peak
    real(*arguments, **keywords)
    peak = max(peak, private())

engine.optimizer.optimizer.step_shard = step_shard
for step in range(2):
    engine.backward(engine(torch.ones(2, 768)).square().mean())
    peak = max(peak, private())
    engine.step()
print(peak - before)
"""


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux")
def test_a_process_keeps_to_its_buffers_whatever_the_size_of_the_model(tmp_path):
    program = tmp_path / "train.py"
    program.write_text(PROGRAM)
    variables = {**os.environ, "DS_ACCELERATOR": "cpu", "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(program), str(tmp_path)]
    said = subprocess.run(command, env=variables, capture_output=True, text=True, check=True, timeout=200).stdout
    states, weight = 24 * 768**2 * 16, 768**2 * 4
    # The step's buffers, requests on their way, a few weights with their gradients, and the allocator's.
    allowed = 4 * 1_800_000 * 4 + 8 * (1 << 20) + 6 * weight + (16 << 20)
    assert int(said) < allowed < states / 3
