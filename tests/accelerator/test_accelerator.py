from __future__ import annotations

import pytest
import torch

import deepspeed
from deepspeed.accelerator import get_accelerator
from deepspeed.accelerator.accelerator import Accelerator

MEGABYTE = 2**20


@pytest.fixture
def cpu() -> Accelerator:
    return Accelerator()


@pytest.fixture
def afresh():
    """The choice of the accelerator is made once per process: forget it before and after."""
    get_accelerator.cache_clear()
    yield get_accelerator
    get_accelerator.cache_clear()


def test_names_and_indices_are_those_that_torch_understands():
    accelerator = deepspeed.get_accelerator()
    assert accelerator is get_accelerator()
    tensor = torch.ones(2, device=accelerator.current_device_name())
    assert tensor.device.type == accelerator.device_name()
    assert accelerator.current_device() in range(accelerator.device_count())


def test_the_cpu_is_one_device(cpu):
    assert (cpu.device_name(), cpu.device_name(0), cpu.device_count()) == ("cpu", "cpu", 1)
    cpu.set_device(0)
    with pytest.raises(ValueError, match="no cpu device 1"):
        cpu.set_device(1)


def test_cpu_memory_in_use_follows_what_the_process_touches(cpu):
    before = cpu.memory_allocated()
    held = torch.ones(64 * MEGABYTE, dtype=torch.uint8)
    assert cpu.memory_allocated() - before >= 48 * MEGABYTE
    del held


def test_the_cpu_memory_peak_outlives_the_memory_and_can_be_reset(cpu):
    cpu.reset_peak_memory_stats()
    before = cpu.max_memory_allocated()
    torch.ones(64 * MEGABYTE, dtype=torch.uint8)
    assert cpu.max_memory_allocated() - before >= 48 * MEGABYTE
    cpu.reset_peak_memory_stats()
    assert cpu.max_memory_allocated() - before < 48 * MEGABYTE


def test_the_machine_has_more_memory_than_is_free_and_than_the_process_uses(cpu):
    assert cpu.total_memory() > cpu.available_memory() > 0
    assert cpu.total_memory() > cpu.memory_allocated()


def test_the_environment_can_choose_the_accelerator(afresh, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert afresh().device_name() == "cpu"
    assert afresh().communication_backend_name() == "gloo"


def test_an_unknown_or_absent_accelerator_is_named(afresh, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "abacus")
    with pytest.raises(ValueError, match="DS_ACCELERATOR is 'abacus', expected one of cpu, cuda"):
        afresh()
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="no CUDA device"):
        afresh()
