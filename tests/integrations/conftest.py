from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from tests.pool import Pool


@pytest.fixture
def ranks(pool: Pool) -> Callable[..., list[Any]]:
    """As elsewhere, with time for a worker that imports these libraries on a busy machine."""
    return partial(pool.run, timeout=110.0)
