"""Sections ``zero_optimization.offload_param``, ``zero_optimization.offload_optimizer`` and ``aio``."""

from __future__ import annotations

from typing import Annotated, Literal

from .section import Int, Lowered, Real, Section, key

OffloadDevice = Annotated[Literal["none", "cpu", "nvme"], Lowered]


class OffloadParamConfig(Section):
    """Where ZeRO-3 parameters lie while they are not in use. With device none the other keys have no effect."""

    device: OffloadDevice = key("none", "none, cpu or nvme.")
    nvme_path: str | None = key(None, "A directory on the NVMe device.")
    buffer_count: Int = key(5, "Buffers for parameters on their way.", unit="buffers", ge=1)
    buffer_size: Int = key(100_000_000, "Size of a buffer.", unit="elements", ge=0)
    max_in_cpu: Int = key(1_000_000_000, "Parameters kept in CPU memory with device nvme.", unit="elements", ge=0)
    pin_memory: bool = key(False, "Page-lock the CPU memory.")


class OffloadOptimizerConfig(Section):
    """Where optimizer states lie, and where the optimizer steps. With device none the other keys have no effect."""

    device: OffloadDevice = key("none", "none, cpu or nvme.")
    nvme_path: str | None = key(None, "A directory on the NVMe device.")
    buffer_count: Int = key(4, "Buffers for states on their way.", unit="buffers", ge=1)
    buffer_size: Int = key(100_000_000, "Size of a buffer.", unit="elements", ge=0)
    pin_memory: bool = key(False, "Page-lock the CPU memory.")
    pipeline: bool = key(False, "Overlap reading and writing with the step.")
    pipeline_read: bool = key(False, "Overlap reading with the step.")
    pipeline_write: bool = key(False, "Overlap writing with the step.")
    fast_init: bool = key(False, "Initialize states on NVMe faster.")
    ratio: Real = key(1.0, "The part of the states that is offloaded.", unit="fraction", ge=0, le=1)
    cpuadam_cores_perc: Real = key(0.8, "The part of the cores that steps (SuperOffload).", unit="fraction", ge=0, le=1)
    super_offload: bool = key(False, "SuperOffload.")


class AioConfig(Section):
    """Asynchronous file I/O of devices nvme (`docs/nvme.md`). Without one of them these keys have no effect."""

    block_size: Int = key(1_048_576, "Size of one request.", unit="bytes", ge=1, le=1 << 30)
    queue_depth: Int = key(8, "Requests of one thread in flight.", unit="requests", ge=1, le=4096)
    thread_count: Int = key(1, "Threads that submit requests.", unit="threads", ge=1, le=4096)
    single_submit: bool = key(False, "Tell the kernel of requests one by one (io_uring).")
    overlap_events: bool = key(True, "Begin requests as earlier ones end, not when all have (io_uring).")
    use_gds: bool = key(False, "GPUDirect storage.")
