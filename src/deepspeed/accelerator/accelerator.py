"""The one face of a device: :func:`get_accelerator` returns the CPU's or CUDA's.

Ask it rather than ``torch.cuda``, and code runs on both. Memory figures are bytes: of the device's caching allocator on
CUDA, of this process's resident set on CPU.
"""

from __future__ import annotations

import os
from functools import cache

import torch

from . import process_memory

SUPPORTED = ("cpu", "cuda")
"""The kinds of devices that this package runs on."""


class Accelerator:
    """A kind of device. This class is the CPU: one device, always up to date, whose memory is the process's own."""

    kind = "cpu"
    backend = "gloo"

    def device_name(self, device_index: int | None = None) -> str:
        """The name by which torch knows the device of that index (the kind alone where None): ``cuda:1``, ``cpu``."""
        return self.kind

    def current_device(self) -> int:
        """The index of the device that this process uses."""
        return 0

    def current_device_name(self) -> str:
        """The name of the device that this process uses."""
        return self.device_name(self.current_device())

    def device_count(self) -> int:
        """Devices that this process sees; the CPU is one."""
        return 1

    def set_device(self, device_index: int) -> None:
        """Use the device of that index from now on. Raises ValueError where there is none."""
        if device_index not in range(self.device_count()):
            raise ValueError(
                f"there is no {self.kind} device {device_index}: this process sees {self.device_count()}, from 0 on"
            )

    def synchronize(self, device_index: int | None = None) -> None:
        """Wait until the device has done what it was given."""

    def communication_backend_name(self) -> str:
        """The backend by which torch.distributed communicates between such devices."""
        return self.backend

    def is_bf16_supported(self) -> bool:
        """Whether bf16 arithmetic works; how fast is another question."""
        return True

    def is_fp16_supported(self) -> bool:
        """Whether fp16 arithmetic works; how fast is another question."""
        return True

    # -- memory, in bytes ----------------------------------------------------------------------------------------------

    def empty_cache(self) -> None:
        """Give memory that is cached and not in use back to the device; the CPU's allocator is the C library's."""

    def memory_allocated(self, device_index: int | None = None) -> int:
        """Bytes in use now."""
        return process_memory.resident_bytes()

    def max_memory_allocated(self, device_index: int | None = None) -> int:
        """The most bytes in use since the start, or since the last ``reset_peak_memory_stats``."""
        return process_memory.peak_resident_bytes()

    def reset_peak_memory_stats(self, device_index: int | None = None) -> None:
        """Measure the peak from now on. Raises OSError where the operating system has no such reset."""
        process_memory.reset_peak()

    def total_memory(self, device_index: int | None = None) -> int:
        """Bytes that the device has."""
        return process_memory.total_bytes()

    def available_memory(self, device_index: int | None = None) -> int:
        """Bytes of the device that are free."""
        return process_memory.available_bytes()


class _Cuda(Accelerator):
    kind = "cuda"
    backend = "nccl"

    def device_name(self, device_index: int | None = None) -> str:
        return self.kind if device_index is None else f"{self.kind}:{device_index}"

    def current_device(self) -> int:
        return torch.cuda.current_device()

    def device_count(self) -> int:
        return torch.cuda.device_count()

    def set_device(self, device_index: int) -> None:
        super().set_device(device_index)
        torch.cuda.set_device(device_index)

    def synchronize(self, device_index: int | None = None) -> None:
        torch.cuda.synchronize(device_index)

    def is_bf16_supported(self) -> bool:
        return torch.cuda.is_bf16_supported()

    def empty_cache(self) -> None:
        torch.cuda.empty_cache()

    def memory_allocated(self, device_index: int | None = None) -> int:
        return torch.cuda.memory_allocated(device_index)

    def max_memory_allocated(self, device_index: int | None = None) -> int:
        return torch.cuda.max_memory_allocated(device_index)

    def reset_peak_memory_stats(self, device_index: int | None = None) -> None:
        torch.cuda.reset_peak_memory_stats(device_index)

    def total_memory(self, device_index: int | None = None) -> int:
        return torch.cuda.mem_get_info(device_index)[1]

    def available_memory(self, device_index: int | None = None) -> int:
        return torch.cuda.mem_get_info(device_index)[0]


_KINDS: dict[str, type[Accelerator]] = {"cpu": Accelerator, "cuda": _Cuda}


@cache
def get_accelerator() -> Accelerator:
    """The accelerator of this process: CUDA where torch finds such a device, the CPU elsewhere.

    The environment variable ``DS_ACCELERATOR`` (``cpu`` or ``cuda``) decides otherwise. Raises ValueError for another
    value there, and RuntimeError where it says ``cuda`` and there is none.
    """
    wanted = os.environ.get("DS_ACCELERATOR")
    if wanted is None:
        return _KINDS["cuda" if torch.cuda.is_available() else "cpu"]()
    if wanted not in _KINDS:
        raise ValueError(f"DS_ACCELERATOR is '{wanted}', expected one of {', '.join(SUPPORTED)}")
    if wanted == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("DS_ACCELERATOR is 'cuda', but torch finds no CUDA device; unset it to use the CPU")
    return _KINDS[wanted]()


def is_current_accelerator_supported() -> bool:
    """Whether this package runs on the accelerator of this process: always, as :func:`get_accelerator` returns no
    other."""
    return get_accelerator().kind in SUPPORTED
