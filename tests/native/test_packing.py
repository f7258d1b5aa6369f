from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from deepspeed.native import kernels, packing

CORE = kernels._load()[0]
SETS = CORE.instruction_sets() if CORE else []


@pytest.fixture(params=SETS)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    assert CORE is not None, "no parameters without a core"
    before = CORE.instruction_set()
    CORE.select(request.param)
    yield request.param
    CORE.select(before)


def numbers(numel: int) -> Tensor:
    """Of many sizes; every third block has no negative one, and some are zero, tiny or just between two bf16 numbers."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(numel, generator=generator) * 10 ** (6 * torch.rand(numel, generator=generator) - 5)
    for start in range(0, numel, 768):
        values[start : start + 256].abs_()
    values[1000:1300] = 0.0
    values[1300:1600] = 1e-42
    bits = values.view(torch.int32)
    bits[1700::97] = bits[1700::97] & ~0xFFFF | 0x8000
    return values


def packed(values: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty(values.numel(), dtype=torch.uint8), torch.empty(packing.block_count(values.numel()))


@pytest.mark.parametrize("numel", [5, 600_001])
def test_8_bit_numbers_have_the_same_bits_in_each_instruction_set_and_in_torch(instruction_set: str, numel: int) -> None:
    values = numbers(numel)
    (codes, scales), (theirs, their_scales) = packed(values), packed(values)
    packing.quantize(values, codes, scales)
    packing.reference_quantize(values, theirs, their_scales)
    assert torch.equal(codes, theirs) and torch.equal(scales, their_scales)
    decoded, plain = torch.empty(numel), torch.empty(numel)
    packing.dequantize(codes, scales, decoded)
    packing.reference_dequantize(codes, scales, plain)
    assert torch.equal(decoded, plain)
    packing.quantize(decoded, theirs, their_scales)
    packing.dequantize(theirs, their_scales, plain)
    assert torch.equal(decoded, plain)  # what was decoded is exact from then on


def test_8_bit_numbers_are_as_near_as_the_code_promises() -> None:
    values = torch.cat([torch.randn(25_600, generator=torch.Generator().manual_seed(1)), torch.rand(25_600)])
    codes, scales = packed(values)
    packing.quantize(values, codes, scales)
    decoded = torch.empty_like(values)
    packing.dequantize(codes, scales, decoded)
    largest = scales.abs().repeat_interleave(256)
    signed, unsigned = (slice(0, 25_600), slice(25_600, None))
    error = (decoded - values).abs() / largest
    assert error[signed].max() < 0.9 / 64 + 1e-6 and error[signed].mean() < 0.004
    assert error[unsigned].max() < 0.9 / 128 + 1e-6 and error[unsigned].mean() < 0.002
    assert torch.equal(decoded.view(-1, 256).abs().amax(1), values.view(-1, 256).abs().amax(1))
    positive = torch.tensor([1.0] + [1e-30] * 255)
    packing.quantize(positive, *(few := packed(positive)))
    packing.dequantize(*few, positive)
    assert (positive > 0).all()


@pytest.mark.parametrize("implementation", ["compiled", "torch"])
def test_split_numbers_are_exact_and_their_high_half_is_the_nearest_bf16(
    monkeypatch: pytest.MonkeyPatch, implementation: str
) -> None:
    if implementation == "torch":
        monkeypatch.setattr(packing, "_load", lambda: (None, "not compiled"))
    random = torch.randint(-(2**31), 2**31 - 1, (600_000,), generator=torch.Generator().manual_seed(2))
    values = random.to(torch.int32).view(torch.float32)
    values = torch.cat([numbers(5001), values[~values.isnan()]])
    high, low = torch.empty(values.numel(), dtype=torch.bfloat16), torch.empty(values.numel(), dtype=torch.int16)
    ties = packing.split(values, high, low)
    assert torch.equal(high, values.bfloat16())
    assert 0 < ties.numel() < 100
    again = torch.empty_like(values)
    packing.merge(high, low, ties, again)
    assert torch.equal(again.view(torch.int32), values.view(torch.int32))


def test_what_does_not_fit_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"300 torch\.float32 values need as many contiguous uint8 codes and 2 fp32 scales"):
        packing.quantize(torch.ones(300), torch.empty(300, dtype=torch.uint8), torch.empty(1))
