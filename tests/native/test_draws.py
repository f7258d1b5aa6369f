from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deepspeed.native import draws, kernels
from deepspeed.native.draws import LEAST_NUMEL, Samples

CORE = kernels._load()[0]
pytestmark = pytest.mark.skipif(CORE is None, reason=kernels.status())
KINDS: dict[str, Callable[[Tensor, float, float], bool]] = {"uniform": draws.uniform_, "normal": draws.normal_}


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(sorted(KINDS)),
    dtype=st.sampled_from(draws.DTYPES),
    extra=st.integers(0, 1300),
    drawn_before=st.integers(0, 1300),
    low=st.floats(-10, 10),
    width=st.floats(0, 10),
)
def test_samples_and_the_generator_after_them_are_those_of_torch(
    kind: str, dtype: torch.dtype, extra: int, drawn_before: int, low: float, width: float
) -> None:
    # Where torch's samples differ on this machine torch draws, and this holds all the same.
    results = []
    for fast in (False, True):
        torch.manual_seed(7)
        torch.rand(drawn_before)
        torch.randn(3)  # Leaves a normal sample in the generator, for the next odd number of them.
        out = torch.empty(LEAST_NUMEL + extra, dtype=dtype)
        if not (fast and KINDS[kind](out, low, width if kind == "normal" else low + width)):
            (out.normal_ if kind == "normal" else out.uniform_)(low, width if kind == "normal" else low + width)
        results.append((out, torch.get_rng_state(), torch.randn(3)))
    for plain, ours in zip(*results, strict=True):
        assert torch.equal(plain, ours)


@pytest.mark.parametrize("dtype", draws.DTYPES)
def test_uniform_samples_are_drawn_by_the_core_of_each_instruction_set(dtype: torch.dtype) -> None:
    assert CORE is not None, "skipped without a core"
    before, results = CORE.instruction_set(), []
    for name in CORE.instruction_sets():
        CORE.select(name)
        for kind in KINDS:
            out = torch.empty(5000, dtype=dtype)
            Samples(kind, -0.3, 0.5).by_core(out, torch.Generator().manual_seed(1))
            results.append(out)
    CORE.select(before)
    assert all(torch.equal(out, results[index % 2]) for index, out in enumerate(results))
    assert draws._torchs_variant("uniform", dtype) is not None


def test_what_cannot_be_drawn_alike_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    state = torch.get_rng_state()
    for out in (torch.ones(100), torch.ones(9000, dtype=torch.float64), torch.ones(9000, 2)[:, 0]):
        assert not draws.uniform_(out, 0, 1) and not draws.normal_(out, 0, 1)
        assert bool((out == 1).all())
    ones = torch.ones(9000)
    assert not draws.uniform_(ones, 1, 0) and not draws.uniform_(ones, 0, float("inf"))
    assert not draws.normal_(ones, 0, -1) and not draws.normal_(ones, float("nan"), 1)
    draws._torchs_variant.cache_clear()
    monkeypatch.setattr(Samples, "by_torch", lambda self, out, generator: out.zero_())
    assert not draws.uniform_(ones, 0, 1) and not draws.normal_(ones, 0, 1)
    draws._torchs_variant.cache_clear()
    assert bool((ones == 1).all()) and torch.equal(torch.get_rng_state(), state)
