"""Unmodified releases of the libraries that train with this package. No test downloads anything."""

import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Accelerate sets the number of threads where this is not set: too many for several ranks on few cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
for library in ("transformers", "accelerate"):
    pytest.importorskip(library, reason=f"{library} is not installed: make test-integrations")
