"""Which implementation moves bytes between memory and files: io_uring, threads of the compiled core, or Python threads.

All three take addresses and descriptors and trust them; ``files`` checks and keeps both alive.
"""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol, get_args

from .core import load as _load
from .file_threads import OpenFile, ThreadedFileEngine

Backend = Literal["io_uring", "threads", "python"]

LARGEST_BLOCK = 1 << 30
MOST_REQUESTS = 4096


@dataclass(frozen=True)
class QueueOptions:
    """How large transfers are cut and how many requests are in flight, by the keys of the configuration's section ``aio``.

    ``block_size`` is the bytes of a request, at least 4096 in effect; each of ``thread_count`` threads has up to
    ``queue_depth`` requests in flight. Of io_uring alone: with ``single_submit`` the kernel is told of requests one by one
    instead of in batches, and without ``overlap_events`` a batch ends before the next begins.
    """

    block_size: int = 1 << 20
    queue_depth: int = 8
    thread_count: int = 1
    single_submit: bool = False
    overlap_events: bool = True

    def __post_init__(self) -> None:
        for name, most in (("block_size", LARGEST_BLOCK), ("queue_depth", MOST_REQUESTS), ("thread_count", MOST_REQUESTS)):
            if not 1 <= getattr(self, name) <= most:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 1 to {most}")


class Running(Protocol):
    """A read or write on its way."""

    def wait(self, seconds: float) -> bool:
        """Whether it ended within so many seconds; negative: wait forever."""

    def cancel(self) -> None:
        """Begin nothing more of it."""

    def outcome(self) -> tuple[int, int, int]:
        """Once it has ended: 0 or what went wrong (``errno``, SHORT_FILE), the byte that failed, and bytes moved."""


class Engine(Protocol):
    """What moves bytes."""

    def submit(self, file: OpenFile, address: int, nbytes: int, offset: int, writing: bool) -> Running:
        """Begin to move ``nbytes`` between memory and ``file``."""

    def register_memory(self, address: int, nbytes: int) -> bool:
        """Prepare memory, which must live until ``close``, for many transfers; whether that has a use."""

    def close(self) -> None:
        """Complete what was submitted, then end the threads."""


@functools.cache
def backends() -> dict[Backend, str]:
    """The backends, best first; what each is, or why it is not there (the text begins with "not ")."""
    core, reason = _load()
    if core is None:
        missing = f"not available: {reason}"
        return {"io_uring": missing, "threads": missing, "python": "Python threads"}
    refusal = core.uring_refusal()
    return {
        "io_uring": f"not available: {refusal}" if refusal else "io_uring",
        "threads": "threads of the compiled core",
        "python": "Python threads",
    }


def best_backend() -> Backend:
    """The first that is available."""
    return next(name for name, text in backends().items() if not text.startswith("not "))


def status() -> str:
    """One line: what moves bytes of files here, and why nothing better does."""
    best = best_backend()
    better = [f"{name} {text}" for name, text in backends().items() if text.startswith("not ")]
    return "; ".join([backends()[best], *better[:1]])


def make_engine(options: QueueOptions, backend: Backend | None = None) -> tuple[Engine, Backend]:
    """An engine of the best backend, or of the one that is named (ValueError where that is not available), and its name.

    RuntimeError where the named one cannot be started: a limit on memory, threads or open files.
    """
    name = backend or best_backend()
    if name not in get_args(Backend):
        raise ValueError(f"backend is {name!r}, expected one of {', '.join(get_args(Backend))}")
    if backends()[name].startswith("not "):
        raise ValueError(f"backend {name!r} is {backends()[name]}; leave it out to use {best_backend()!r}")
    if name == "python":
        return ThreadedFileEngine(options.block_size, options.queue_depth * options.thread_count), name
    core: Any = _load()[0]
    arguments = asdict(options) | {"block_size": max(options.block_size, 4096)}
    try:
        return core.FileEngine(**arguments, uring=name == "io_uring"), name
    except RuntimeError:
        if backend or name == "threads":
            raise
        return make_engine(options, "threads")  # a small ring was allowed, this one is too large


def direct_alignments(descriptor: int) -> tuple[int, int]:
    """The alignments of offsets and of memory that O_DIRECT needs; the size of a page where nobody knows."""
    core = _load()[0]
    offset, memory = core.direct_alignments(descriptor) if core is not None else (0, 0)
    return offset or 4096, memory or 4096
