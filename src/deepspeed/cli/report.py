"""``ds_report``: what this machine offers to a training run, for a look and for a bug report."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import resource
import shutil
import sys
from pathlib import Path

OPTIONAL_LIBRARIES = ("transformers", "accelerate", "lightning", "tensorboard", "wandb", "triton")
LAUNCH_TOOLS = ("ssh", "pdsh", "mpirun", "mpiexec.hydra", "srun")
INSTRUCTION_SETS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve")

Rows = list[tuple[str, str]]


def main() -> int:
    """Print the report; returns 0, the command's exit code."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(soft_wrap=True, highlight=False)
    for title, rows in sections().items():
        table = Table(title=title, title_justify="left", show_header=False, box=None, pad_edge=False)
        table.add_column(no_wrap=True, min_width=20)
        table.add_column(overflow="fold")
        for name, value in rows:
            table.add_row(escape(name), escape(value))
        console.print(table)
        console.print()
    return 0


def sections() -> dict[str, Rows]:
    """The report: by title, rows of a name and what was found."""
    return {"software": _software(), "machine": _machine(), "communication": _communication(), "optional": _optional()}


def _software() -> Rows:
    import torch

    from .. import __version__, native
    from ..native.file_engine import status as file_status

    return [
        ("deepspeed", f"{__version__} in {Path(__file__).parent.parent}"),
        ("torch", f"{torch.__version__} in {Path(torch.__file__).parent}"),
        ("python", f"{platform.python_version()} at {sys.executable}"),
        ("system", platform.platform()),
        ("native kernels", native.status()),
        ("file I/O", file_status()),
    ]


def _machine() -> Rows:
    import psutil  # type: ignore[import-untyped]

    memory = psutil.virtual_memory()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else psutil.cpu_count()
    cores = f"{psutil.cpu_count(logical=False) or 'unknown'} physical, {psutil.cpu_count()} logical"
    return [
        ("processor", _processor()),
        ("instructions", _instruction_sets()),
        ("cores", f"{cores}, {usable} for this process"),
        ("memory", f"{memory.total / 1e9:.1f} GB, {memory.available / 1e9:.1f} GB available"),
        ("shared memory", _shared_memory()),
        ("locked memory", _locked_memory()),
        ("accelerators", _accelerators()),
    ]


def _communication() -> Rows:
    import torch.distributed as dist

    available = {
        "gloo": dist.is_gloo_available(),
        "nccl": dist.is_nccl_available(),
        "mpi": dist.is_mpi_available(),
        "ucc": dist.is_ucc_available(),
    }
    tools = {tool: shutil.which(tool) for tool in LAUNCH_TOOLS}
    return [
        ("backends", ", ".join(name for name, there in available.items() if there) or "none"),
        *((tool, path or "not on PATH") for tool, path in tools.items()),
    ]


def _optional() -> Rows:
    return [(name, _version(name)) for name in OPTIONAL_LIBRARIES]


def _version(name: str) -> str:
    if importlib.util.find_spec(name) is None:
        return "not installed"
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "installed, version unknown"


def _processor_lines() -> dict[str, str]:
    """The first processor's lines in /proc/cpuinfo; empty off Linux."""
    try:
        text = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _processor() -> str:
    return _processor_lines().get("model name") or platform.processor() or platform.machine()


def _instruction_sets() -> str:
    lines = _processor_lines()
    flags = (lines.get("flags") or lines.get("Features") or "").split()
    return ", ".join(name for name in INSTRUCTION_SETS if name in flags) or f"{platform.machine()} baseline"


def _shared_memory() -> str:
    try:
        usage = shutil.disk_usage("/dev/shm")
    except OSError:
        return "no /dev/shm"
    return f"{usage.total / 1e9:.2f} GB in /dev/shm, {usage.free / 1e9:.2f} GB free"


def _locked_memory() -> str:
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return "unlimited (ulimit -l)" if limit == resource.RLIM_INFINITY else f"at most {limit / 1e6:.1f} MB (ulimit -l)"


def _accelerators() -> str:
    import torch

    count = torch.cuda.device_count()
    if not count:
        return "none: ranks run on the CPU"
    return ", ".join(torch.cuda.get_device_name(index) for index in range(count))


if __name__ == "__main__":
    sys.exit(main())
