"""File I/O as the configuration wants it."""

from __future__ import annotations

from ..config.offload import AioConfig
from ..native.file_engine import QueueOptions


def queue_options(aio: AioConfig) -> QueueOptions:
    """The options of a file queue by the section ``aio``. Its ``use_gds`` is an error when the configuration is loaded."""
    return QueueOptions(**aio.model_dump(exclude={"use_gds"}))


def aio_section(options: QueueOptions) -> dict[str, int | bool]:
    """The section ``aio`` that makes ``options``."""
    return AioConfig(**vars(options)).model_dump(exclude={"use_gds"})
