"""What a rank costs, measured from outside the engine: memory from the kernel and from live storages, traffic from the
kernel's counter of the loopback interface. Nothing here knows which engine runs."""

from __future__ import annotations

import gc
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor


def resident_bytes(field: str = "VmRSS") -> int:
    """This process's resident memory now (``VmRSS``) or at its highest (``VmHWM``), in bytes.

    Not ``getrusage``: its peak survives ``exec``, so a small child of a large parent would report the parent's.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}: this needs Linux")


def reset_peak() -> None:
    """Start ``VmHWM`` anew from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def loopback_bytes() -> int:
    """Bytes that all processes of this network namespace have sent over the loopback interface so far."""
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == "lo":
            return int(counters.split()[0])
    raise RuntimeError("/proc/self/net/dev has no interface 'lo': gloo ranks of one machine talk over it")


def live_tensor_bytes(excluded: Iterable[Tensor] = ()) -> int:
    """Bytes of the distinct storages of all tensors that Python can reach, gradients included, in this process.

    Called between ``backward`` and ``step`` these are the model states and the engine's buffers; activations are freed
    by then. What only C++ holds is not seen (hence DDP is run with its gradients as views of its buckets).
    """
    skip = {_storage_key(tensor) for tensor in excluded}
    sizes: dict[int, int] = {}
    for tensor in _reachable_tensors():
        key = _storage_key(tensor)
        if key and key not in skip:
            sizes[key] = max(sizes.get(key, 0), tensor.untyped_storage().nbytes())
    return sum(sizes.values())


def _reachable_tensors() -> Iterable[Tensor]:
    gc.collect()
    for item in gc.get_objects():
        # type(), not isinstance(): the latter asks lazy modules and proxies for __class__, which runs their code.
        if not issubclass(type(item), Tensor):
            continue
        for tensor in (item, item.grad if item.is_leaf else None):
            local = getattr(tensor, "_local_tensor", tensor)  # a DTensor's own shard
            if local is not None and local.layout == torch.strided and local.device.type != "meta":
                yield local


def _storage_key(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
