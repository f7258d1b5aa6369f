"""States on a disk: every combination trains to the same bits as without."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import deepspeed
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_grad,
    safe_set_full_optimizer_state,
)
from deepspeed.zero.released import home_of
from tests.parity import Training, assert_equal, generator, make_engine, state_of, train_engine

WIDTH = 12


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(WIDTH, 30), nn.Tanh(), nn.Linear(30, WIDTH)) for _ in range(3)])
        self.leave = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for block in self.blocks:
            x = x + block(x)
        return self.leave(x)


def inputs(index: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(4, WIDTH, generator=generator(index)).to(dtype)


def step(model: nn.Module, index: int, backward: Callable[..., object]) -> None:
    x = inputs(index, next(model.parameters()).dtype)
    backward(model(x).float().square().mean())


ADAM = {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.1}}
SGD = {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}}
MODES: dict[str, dict[str, Any]] = {
    "fp32": {"optimizer": ADAM},
    "sgd": {"optimizer": SGD},
    "bf16": {"optimizer": ADAM, "bf16": {"enabled": True}, "gradient_clipping": 0.5},
    # The first step overflows.
    "fp16": {"optimizer": ADAM, "fp16": {"enabled": True, "initial_scale_power": 18, "hysteresis": 1}},
}


def training(mode: str, accumulation: int = 1, **zero: object) -> Training:
    return Training(Blocks, step, steps=4, accumulation=accumulation, config={**MODES[mode], "zero_optimization": zero})


def on_disk(folder: Path, *sections: str, **more: object) -> dict[str, object]:
    """States of ``sections`` on a disk, in chunks of a few dozen elements."""
    sizes = {"offload_optimizer": {"buffer_size": 400}, "offload_param": {"max_in_cpu": 0}}
    return {section: {"device": "nvme", "nvme_path": str(folder), **sizes[section], **more} for section in sections}


def with_and_without(plain: Training, tiered: Training, stage: int) -> None:
    expected, actual = train_engine(plain, stage), train_engine(tiered, stage)
    assert_equal(actual.weights, expected.weights)
    assert str(actual.norms) == str(expected.norms)  # a skipped step has NaN


EVERYTHING = ("offload_optimizer", "offload_param")
COMBINATIONS = [
    (1, ("offload_optimizer",)),
    (2, ("offload_optimizer",)),
    (3, ("offload_optimizer",)),
    (3, ("offload_param",)),
    (3, EVERYTHING),
]


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("stage", "sections"), COMBINATIONS, ids=str)
def test_states_on_a_disk_train_to_the_same_bits(ranks, tmp_path, stage, sections, mode, size):
    for accumulation in (1, 4):
        tiered = training(mode, accumulation, **on_disk(tmp_path, *sections))
        ranks(size, with_and_without, training(mode, accumulation), tiered, stage)


OPTIONS = [{"pipeline": False}, {"pipeline_read": False}, {"ratio": 0.5}, {"buffer_count": 1}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options_of_the_stream_change_no_bit(ranks, tmp_path, options):
    tiered = training("bf16", **on_disk(tmp_path, "offload_optimizer", **options))
    ranks(2, with_and_without, training("bf16"), tiered, 2)


@pytest.mark.parametrize("kind", ["Lion", "Adagrad", "Adam"])
def test_optimizers_that_step_slice_by_slice_have_their_states_on_a_disk(ranks, tmp_path, kind):
    optimizer = {"optimizer": {"type": kind, "params": {"lr": 0.01}}}
    plain, tiered = (
        Training(Blocks, step, steps=3, config={**optimizer, "zero_optimization": zero})
        for zero in ({}, on_disk(tmp_path, *EVERYTHING))
    )
    ranks(2, with_and_without, plain, tiered, 3)


def bytes_in_memory(zero: dict[str, object], stage: int) -> dict[str, list[int]]:
    """Bytes of parameters, gradients, masters and optimizer states, after a backward and after a step."""
    engine = make_engine(training("bf16", **zero), stage)
    found = {}
    for index, moment in enumerate(("backward", "step")):
        step(engine, index, engine.backward)
        if moment == "step":
            engine.step()
        here = engine.model_state_bytes()
        found[moment] = [here.parameters, here.gradients, here.master, here.optimizer]
        engine.zero_grad()
    engine.destroy()
    return found


def test_what_lies_on_the_disk_takes_no_memory(ranks, tmp_path):
    everything = on_disk(tmp_path, *EVERYTHING)
    (found,) = ranks(1, bytes_in_memory, {"stage3_param_persistence_threshold": 0, **everything}, 3)
    assert found["backward"] == [0, 0, 0, 0] and found["step"][:3] == [0, 0, 0]
    step_numbers = found["step"][3]
    assert step_numbers < 100
    (below_stage_3,) = ranks(1, bytes_in_memory, on_disk(tmp_path, "offload_optimizer"), 2)
    assert below_stage_3["step"][0] > 0 and below_stage_3["step"][1:3] == [0, 0]
    (half,) = ranks(1, bytes_in_memory, on_disk(tmp_path, "offload_optimizer", ratio=0.5), 2)
    (whole,) = ranks(1, bytes_in_memory, {}, 2)
    assert 0.3 < half["step"][2] / whole["step"][2] < 0.7


def saved_and_resumed(tiered: Training, plain: Training, stage: int, folder: str) -> None:
    """Two steps from a disk, saved; the rest by an engine in memory and by one from a disk."""
    first = make_engine(tiered, stage)
    rank, size = first.communicator.rank, first.communicator.size
    for index in range(2):
        step(first, index * size + rank, first.backward)
        first.step()
    first.save_checkpoint(folder, tag="two")
    first.destroy()
    results = []
    for training_ in (tiered, plain):
        engine = make_engine(training_, stage)
        engine.load_checkpoint(folder)
        for index in range(2, 4):
            step(engine, index * size + rank, engine.backward)
            engine.step()
        results.append(state_of(engine.module))
        engine.destroy()
    expected = train_engine(plain, stage).weights
    for result in results:
        assert_equal(result, expected)


@pytest.mark.parametrize("mode", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [2, 3])
def test_checkpoints_are_saved_from_a_disk_and_loaded_to_it_and_to_memory(ranks, tmp_path, stage, mode):
    sections = EVERYTHING[: stage - 1]
    tiered = training(mode, **on_disk(tmp_path / "nvme", *sections))
    ranks(2, saved_and_resumed, tiered, training(mode), stage, str(tmp_path / "checkpoints"))


def inspected(tiered: Training) -> None:
    engine = make_engine(tiered, 3)
    step(engine, 0, engine.backward)
    weight = engine.module.blocks[0][0].weight
    gradient = safe_get_full_grad(weight)
    safe_set_full_grad(weight, torch.zeros_like(gradient))
    norm = float(torch.stack([safe_get_full_grad(p).norm() for p in engine.module.parameters()]).norm())
    before = safe_get_full_fp32_param(weight)
    engine.step()
    assert engine.get_global_grad_norm() == pytest.approx(norm, rel=1e-6) and gradient.any()
    assert torch.equal(safe_get_full_fp32_param(weight), before * (1 - 1e-2 * 0.1))  # weight decay alone
    assert not safe_get_full_optimizer_state(weight, "exp_avg").any()
    safe_set_full_fp32_param(weight, torch.ones_like(before))
    safe_set_full_optimizer_state(weight, torch.full_like(before, 0.5), "exp_avg")
    assert safe_get_full_fp32_param(weight).eq(1).all() and safe_get_full_optimizer_state(weight, "exp_avg").eq(0.5).all()
    with deepspeed.zero.GatheredParameters(weight, modifier_rank=0):
        assert weight.eq(1).all()
        weight.data.fill_(2)
    assert safe_get_full_fp32_param(weight).eq(2).all()
    with pytest.raises(RuntimeError, match=r"lie on a disk.*save_checkpoint"):
        engine.optimizer.state_dict()
    engine.destroy()
    with deepspeed.zero.GatheredParameters(weight):
        assert weight.eq(2).all()


@pytest.mark.parametrize("size", [1, 2])
def test_what_lies_on_a_disk_can_be_inspected_and_changed(ranks, tmp_path, size):
    ranks(size, inspected, training("fp32", **on_disk(tmp_path, *EVERYTHING)))


def constructed_on_disk(zero: dict[str, object]) -> list[int]:
    config = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, **zero}}
    torch.manual_seed(3)
    with deepspeed.zero.Init(config_dict_or_path=config, remote_device="nvme"):
        model = Blocks()
        model.enter.weight.data.mul_(2)
    slices = [home_of(p).parts[0].flat.slices[0].untyped_storage().nbytes() for p in model.parameters()]
    with deepspeed.zero.GatheredParameters(model):
        torch.manual_seed(3)
        expected = Blocks()
        expected.enter.weight.data.mul_(2)
        assert_equal(dict(model.named_parameters()), dict(expected.named_parameters()))
    tiered = Training(lambda: model, step, steps=2, config={**MODES["fp32"], "zero_optimization": config["zero_optimization"]})
    plain = Training(lambda: expected, step, steps=2, config={**MODES["fp32"], "zero_optimization": {"stage": 3}})
    with_and_without(plain, tiered, 3)
    return slices


@pytest.mark.parametrize("size", [1, 2])
def test_a_model_is_constructed_on_the_disk(ranks, tmp_path, size):
    for slices in ranks(size, constructed_on_disk, on_disk(tmp_path, *EVERYTHING)):
        assert not any(slices)


def refused(config: dict[str, Any]) -> str:
    try:
        make_engine(Training(Blocks, step, config=config), 2)
    except (ValueError, OSError, RuntimeError) as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"optimizer": {"type": "Lamb", "params": {"lr": 0.1}}}, "Lamb needs all its states at once"),
        ({"nvme_path": "/proc/nowhere"}, "/proc/nowhere"),
    ],
    ids=str,
)
def test_what_cannot_lie_on_a_disk_is_an_error_on_every_rank(ranks, tmp_path, config, text):
    path = config.pop("nvme_path", str(tmp_path))
    zero = {"offload_optimizer": {"device": "nvme", "nvme_path": path}}
    for found in ranks(2, refused, {**MODES["fp32"], "zero_optimization": zero, **config}):
        assert text in found


def test_nothing_is_left_on_the_disk(ranks, tmp_path):
    ranks(2, with_and_without, training("fp32"), training("fp32", **on_disk(tmp_path, *EVERYTHING)), 3)
    assert not list(tmp_path.iterdir())


def open_files(folder: str) -> int:
    """The files of this process that lie in ``folder``, whether or not they have a name."""
    gc.collect()
    return sum(folder in str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink())


def destroyed(zero: dict[str, object], folder: str) -> list[int]:
    engine = make_engine(training("bf16", **zero), 3)
    model = engine.module
    step(engine, 0, engine.backward)
    engine.step()
    found = [open_files(folder)]
    engine.destroy()
    found.append(open_files(folder))
    with deepspeed.zero.GatheredParameters(model):
        assert all(bool(p.isfinite().all()) for p in model.parameters())
    del engine, model
    return [*found, open_files(folder)]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux")
def test_the_file_of_states_goes_with_the_engine_and_that_of_parameters_with_the_model(ranks, tmp_path):
    # A file is open twice: with the page cache, and without where the file system can do that.
    for both, after, without_model in ranks(2, destroyed, on_disk(tmp_path, *EVERYTHING), str(tmp_path)):
        assert both == 2 * after > 0 and without_model == 0


def loaded_twice(zero: dict[str, object], folder: str) -> list[int]:
    engine = make_engine(training("fp32", **zero), 2)
    step(engine, 0, engine.backward)
    engine.step()
    engine.save_checkpoint(folder)
    found = []
    for _ in range(2):
        engine.load_checkpoint(folder)
        file = engine.optimizer.flat.tiers.states
        found.append(sum(e._storage.nbytes() for e in file._known.values()))
        found.append(len(file._known))
    engine.destroy()
    return found


def test_states_that_are_replaced_keep_neither_memory_nor_a_place(ranks, tmp_path):
    zero = on_disk(tmp_path / "nvme", "offload_optimizer")
    for memory, places, memory_later, places_later in ranks(2, loaded_twice, zero, str(tmp_path / "checkpoints")):
        assert memory == memory_later == 0 and places == places_later > 0


def room_used(training_: Training, stage: int) -> list[tuple[int, int, int]]:
    """Of each file: bytes that had their places reserved at initialize, that have places after two steps, and its size."""
    engine = make_engine(training_, stage)
    tiers = engine.optimizer.flat.tiers
    files = [file for file in (tiers.parameters, tiers.states) if file is not None]
    reserved = [file._file.nbytes for file in files]
    for index in range(2):
        step(engine, index, engine.backward)
        engine.step()
    found = [(before, file.nbytes, file._file.nbytes) for before, file in zip(reserved, files, strict=True)]
    engine.destroy()
    return found


@pytest.mark.parametrize(("mode", "stage"), [("bf16", 3), ("sgd", 2), ("fp16", 1)])
def test_room_on_the_disk_is_reserved_at_initialize_to_the_byte(ranks, tmp_path, mode, stage):
    zero = on_disk(tmp_path, *(EVERYTHING if stage == 3 else ("offload_optimizer",)))
    for files in ranks(2, room_used, training(mode, 2, **zero), stage):
        for reserved, placed, size in files:
            assert reserved == placed == size > 0


def initialized_with(training_: Training, free: int) -> tuple[str, str]:
    """What ``initialize`` raises where the disk has so many bytes free."""
    real = os.statvfs

    def statvfs(path: object) -> object:
        found = real(path)
        return SimpleNamespace(f_bavail=free, f_frsize=1, f_blocks=found.f_blocks)

    with mock.patch("os.statvfs", statvfs):
        try:
            make_engine(training_, 3).destroy()
        except OSError as error:
            return type(error).__name__, str(error)
    return "", ""


def test_a_disk_that_is_too_small_is_an_error_with_the_arithmetic_on_every_rank(ranks, tmp_path):
    tiered = training("bf16", **on_disk(tmp_path, *EVERYTHING))
    for kind, text in ranks(2, initialized_with, tiered, 100_000):
        assert kind == "OSError"
        assert "each of 2 ranks has" in text and "of gradients + " in text and "has 0.100 MB free" in text
    assert not list(tmp_path.iterdir())
    assert ranks(2, initialized_with, tiered, 10**9) == [("", "")] * 2
