"""Ranks that do different things, and ranks that die: every rank is told soon, with and without ``enable_sanity_checks``."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from deepspeed.comm.operations import CollectiveError
from tests.parity import Training, assert_equal, assert_parity, generator, make_engine, train_engine

WIDTH = 12
SOON = 20.0
"""Seconds: far below the timeout of half an hour, far above what a busy machine takes."""


def with_checks(**more: object) -> dict[str, object]:
    return {"zero_optimization": {"enable_sanity_checks": True, **more}}


CHECKS = with_checks()


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(3)])

    def forward(self, x: Tensor, *chosen: int) -> Tensor:
        for index in chosen:
            x = torch.tanh(self.layers[index](x))
        return x


def all_branches(model: nn.Module, index: int, backward: Callable[..., object]) -> None:
    backward(model(inputs(index), 0, 1, 2).square().mean())


def inputs(index: int) -> Tensor:
    return torch.randn(3, WIDTH, generator=generator(index))


TRAINING = Training(Branches, all_branches, config=CHECKS)


def set_timeout(seconds: float) -> None:
    """Make the default group anew with another timeout."""
    rank, size, store = dist.get_rank(), dist.get_world_size(), dist.distributed_c10d._get_default_store()
    dist.destroy_process_group()
    store = dist.PrefixStore("anew", store)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=seconds))


def told(action: Callable[[], object]) -> str:
    """What a rank is told that runs ``action``, soon."""
    started = time.monotonic()
    try:
        action()
    except CollectiveError as error:
        assert time.monotonic() - started < SOON
        return str(error)
    return ""


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_with_checks_every_stage_trains_to_the_numbers_of_plain_torch(ranks, size, accumulation):
    assert_parity(ranks, Training(Branches, all_branches, accumulation=accumulation, config=CHECKS), size)


def with_and_without(stage: int) -> list[dict[str, Tensor]]:
    return [train_engine(Training(Branches, all_branches, config=config), stage).weights for config in (CHECKS, {})]


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_checks_change_no_bit(ranks, stage):
    for checked, unchecked in ranks(2, with_and_without, stage):
        assert_equal(checked, unchecked)


def run_modules_in_another_order(ahead: int) -> str:
    engine = make_engine(Training(Branches, all_branches, config=with_checks(stage3_prefetch_bucket_size=ahead)), 3)
    other = (0, 1, 2) if engine.global_rank == 0 else (0, 2, 1)

    def train() -> None:
        for index in range(2):
            all_branches(engine, index, engine.backward)
            engine.step()
        for index in range(2, 4):
            engine.backward(engine(inputs(index), *other).square().mean())
            engine.step()

    return told(train)


def test_ranks_that_run_modules_in_another_order_are_told_the_modules(ranks):
    for text in ranks(2, run_modules_in_another_order, 0):
        assert "rank 0 is at the fetch of unit 'layers.1' (all_gather of 192 float32)" in text
        assert "rank 1 is at the fetch of unit 'layers.2' (all_gather of 192 float32)" in text


def test_ranks_whose_order_differs_are_told_so_also_where_units_are_fetched_ahead(ranks):
    first, second = ranks(2, run_modules_in_another_order, 1000)
    assert first == second
    assert "rank 0 " in first and "rank 1 " in first and "the fetch of unit 'layers." in first


def skip_a_layer(stage: int) -> str:
    """Rank 1 ends its forward and waits for a reduction, or for the agreement on the norm."""
    engine = make_engine(TRAINING, stage)
    chosen = (0, 1, 2) if engine.global_rank == 0 else (0, 1)

    def train() -> None:
        engine.backward(engine(inputs(0), *chosen).square().mean())
        engine.step()

    return told(train)


def test_a_rank_that_skips_a_module_is_told_where_the_others_are(ranks):
    for text in ranks(2, skip_a_layer, 3):
        assert "rank 0 is at the fetch of unit 'layers.2'" in text or "in the fetch of unit 'layers.2'" in text
        assert "rank 1" in text
    # Below stage 3 every rank has every layer.
    assert ranks(2, skip_a_layer, 2) == ["", ""]


def end_early(stage: int, destroy: bool) -> str:
    engine = make_engine(TRAINING, stage)

    def train() -> None:
        for index in range(3 - engine.global_rank):
            all_branches(engine, index, engine.backward)
            engine.step()
        if destroy:
            engine.destroy()
        elif engine.global_rank == 1:
            engine.save_checkpoint("nowhere")

    return told(train)


@pytest.mark.parametrize("stage", [1, 3])
def test_a_rank_with_less_data_than_the_others_is_told_from_one_that_is_slow(ranks, stage):
    first, second = ranks(2, end_early, stage, True)
    assert "rank 1 has left (its engine was destroyed, or its program has ended)" in first
    assert ("in the fetch of unit 'layers." if stage == 3 else "in the reduction of bucket 0 (layers.2.") in first
    assert second == ""


@pytest.mark.parametrize("stage", [1, 3])
def test_a_rank_that_saves_while_others_train_is_told_so(ranks, stage):
    for text in ranks(2, end_early, stage, False):
        assert "the save before this one" in text
        assert ("fetch of unit 'layers.0'" if stage == 3 else "reduction of bucket 0 (layers.2.") in text


# -- without the switch ------------------------------------------------------------------------------------------------


def fetch_in_another_order_without_checks(seconds: float, transport: str) -> str:
    set_timeout(seconds)
    config = {"zero_optimization": {"stage3_prefetch_bucket_size": 0}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEEPSPEED_HOST_TRANSPORT", transport)
        engine = make_engine(Training(Branches, all_branches, config=config), 3)
    other = (0, 1, 2) if engine.global_rank != 1 else (0, 2, 1)

    def train() -> None:
        all_branches(engine, 0, engine.backward)
        engine.step()
        engine(inputs(1), *other)

    return told(train)


@pytest.mark.parametrize(("transport", "reason"), [("0", "Timed out"), ("1", "it came to another operation")])
def test_a_wait_in_vain_says_for_what_and_for_whom_and_what_to_switch_on(ranks, transport, reason):
    texts = ranks(2, fetch_in_another_order_without_checks, 2.0, transport)
    for rank, text in enumerate(texts):
        unit = "layers.1" if rank == 0 else "layers.2"
        start = f"rank {rank} waited for rank {1 - rank} in vain in the fetch of unit '{unit}' (all_gather of "
        assert text.startswith(start)
        assert "s since" in text and "zero_optimization.enable_sanity_checks set to true" in text
    assert any(reason in text for text in texts)


PROGRAM = """
import os, signal, sys, torch, deepspeed

how, checks = sys.argv[1], sys.argv[2] == "True"
model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
config = {
    "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, "enable_sanity_checks": checks},
}
engine = deepspeed.initialize(model=model, config=config)[0]
for step in range(3):
    if step == 2 and engine.global_rank == 1:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ValueError("no more data")
    engine.backward(engine(torch.ones(2, 8)).square().mean())
    engine.step()
"""


@pytest.mark.parametrize(("how", "checks"), [("killed", False), ("raises", True)])
def test_programs_without_a_launcher_end_where_one_of_them_dies(tmp_path, how, checks):
    program = tmp_path / "train.py"
    program.write_text(PROGRAM)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    common = {**os.environ, "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    command = [sys.executable, program, how, str(checks)]
    environments = [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    running = [subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True) for env in environments]
    errors = [process.communicate(timeout=100)[1] for process in running]
    assert "CollectiveError: " in errors[0] and running[0].returncode == 1
    assert ("rank 1 has left" if checks else "rank 0 waited for rank 1 in vain in the fetch of unit '0'") in errors[0]
    assert how == "killed" or "ValueError: no more data" in errors[1]
