"""Ways to hold fp32 numbers in fewer bytes: in plain torch, which says what they mean, and compiled, with the same bits.

*Block-wise 8-bit numbers*, after Dettmers et al., "8-bit Optimizers via Block-wise Quantization" (2022). Each block of 256
elements has its largest magnitude as its scale; an element is that times a value of a *dynamic* code, in which the number of
leading zero bits is a decimal exponent and the bits behind the first one a linear fraction. A block without negative elements
uses the eight bits for magnitudes, from 1 to 5e-8, any other seven and a sign; the scale's own sign says which. Three choices:

- the greatest value is 1, so that a block's largest element is exact, and what was decoded encodes to the same bits again;
- in a block without negative elements what is not zero stays so: a second moment that vanished would leave a first moment
  divided by nothing;
- nothing depends on what lies in other blocks.

*Split numbers*: the bf16 number that is nearest, ties to even, and the 16 low bits of the fp32 one. Together they are exact
but where the low bits are just half: then it must be known which of them were rounded up (one of 131072 random numbers).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from .core import load as _load

BLOCK_NUMEL = 256
"""Elements that share a scale."""

SMALLEST_SCALE = torch.finfo(torch.float32).tiny
LEVELS = 8
"""Decimal exponents of the longer code."""


@dataclass(frozen=True)
class _Code:
    """Of a code with ``bits`` for magnitudes: magnitude x, of decimal exponent -e as ``thresholds`` say, has the number
    ``x * slopes[e] + offsets[e]``, rounded down; number c has the value ``values[c]``. All fp32."""

    bits: int
    thresholds: Tensor
    slopes: Tensor
    offsets: Tensor
    values: Tensor


@functools.cache
def _code(bits: int) -> _Code:
    exponents = range(bits)
    firsts = [2.0 ** (bits - 1 - e) for e in exponents]  # the first number of each exponent, and how many it has
    values = [0.0]
    for number in range(1, 2**bits):
        e = bits - number.bit_length()
        values.append(10.0**-e * (0.1 + 0.9 * ((number - firsts[e] + 0.5) / firsts[e])))
    values[-1] = 1.0
    both = values if bits == 8 else values + [-value for value in values]
    return _Code(
        bits,
        torch.tensor([10.0**-e for e in range(1, bits)]),
        torch.tensor([10.0**e * firsts[e] / 0.9 for e in exponents]),
        torch.tensor([firsts[e] * 8 / 9 for e in exponents]),
        torch.tensor(both),
    )


@functools.cache
def _book() -> Tensor:
    """Both codes as the core reads them: thresholds, slopes, offsets and values of the longer, then of the shorter one."""
    rows = []
    for bits in (8, 7):
        code = _code(bits)
        for column in (code.thresholds, code.slopes, code.offsets):
            rows.append(torch.nn.functional.pad(column, (0, LEVELS - column.numel())))
        rows.append(code.values)
    return torch.cat(rows)


def block_count(numel: int) -> int:
    """Blocks of which so many elements are made; the last may be shorter."""
    return -(-numel // BLOCK_NUMEL)


def quantize(values: Tensor, codes: Tensor, scales: Tensor) -> None:
    """Hold ``values`` (fp32) in ``codes`` (uint8, as many) and ``scales`` (fp32, one of each block). All 1-D, contiguous."""
    core = _load()[0] if values.device.type == "cpu" else None
    if core is None:
        reference_quantize(values, codes, scales)
        return
    core.quantize(**_addresses(values, codes, scales))


def dequantize(codes: Tensor, scales: Tensor, values: Tensor) -> None:
    """Give ``values`` what ``quantize`` held in ``codes`` and ``scales``."""
    core = _load()[0] if values.device.type == "cpu" else None
    if core is None:
        reference_dequantize(codes, scales, values)
        return
    core.dequantize(**_addresses(values, codes, scales))


def _addresses(values: Tensor, codes: Tensor, scales: Tensor) -> dict[str, int]:
    """What the core is given of tensors that fit each other. Raises ValueError where they do not."""
    fits = codes.numel() == values.numel() and scales.numel() == block_count(values.numel())
    dtypes = (values.dtype, codes.dtype, scales.dtype) == (torch.float32, torch.uint8, torch.float32)
    if not (fits and dtypes and all(t.is_contiguous() for t in (values, codes, scales))):
        raise ValueError(
            f"{values.numel()} {values.dtype} values need as many contiguous uint8 codes and {block_count(values.numel())} "
            f"fp32 scales; got {codes.numel()} {codes.dtype} and {scales.numel()} {scales.dtype}"
        )
    return {
        "values": values.data_ptr(),
        "codes": codes.data_ptr(),
        "scales": scales.data_ptr(),
        "numel": values.numel(),
        "book": _book().data_ptr(),
        "threads": torch.get_num_threads(),
    }


def reference_quantize(values: Tensor, codes: Tensor, scales: Tensor) -> None:
    """``quantize`` in plain torch."""
    padded = torch.nn.functional.pad(values, (0, scales.numel() * BLOCK_NUMEL - values.numel()))
    blocks = padded.view(-1, BLOCK_NUMEL)
    largest = blocks.abs().amax(1).clamp_(min=SMALLEST_SCALE)
    negative = blocks.signbit()
    signed = negative.any(1)
    magnitudes = blocks.abs() * (1.0 / largest)[:, None]
    eight, seven = _numbers(magnitudes, _code(8)), _numbers(magnitudes, _code(7))
    eight = torch.where((eight < 1) & (magnitudes > 0), 1.0, eight)
    encoded = torch.where(signed[:, None], seven + 128 * negative, eight)
    codes.copy_(encoded.reshape(-1)[: codes.numel()])
    scales.copy_(torch.where(signed, largest, -largest))


def _numbers(magnitudes: Tensor, code: _Code) -> Tensor:
    exponents = sum((magnitudes < t).long() for t in code.thresholds.to(magnitudes.device))
    slopes, offsets = code.slopes.to(magnitudes.device), code.offsets.to(magnitudes.device)
    numbers = (magnitudes * slopes[exponents] + offsets[exponents]).floor_()
    return torch.where(numbers < 2**code.bits - 1, numbers, 2.0**code.bits - 1)


def reference_dequantize(codes: Tensor, scales: Tensor, values: Tensor) -> None:
    """``dequantize`` in plain torch."""
    wide = scales.repeat_interleave(BLOCK_NUMEL)[: codes.numel()]
    numbers = codes.long()
    eight, seven = (_code(bits).values.to(codes.device)[numbers] for bits in (8, 7))
    values.copy_(torch.where(wide < 0, eight, seven) * wide.abs())


def split(values: Tensor, high: Tensor, low: Tensor) -> Tensor:
    """Hold ``values`` (fp32) in ``high`` (bf16), as ``values.to(torch.bfloat16)`` is, and ``low`` (int16). Returns the indices
    (int64) of what was rounded up from just between two. All 1-D, contiguous."""
    core = _load()[0] if values.device.type == "cpu" else None
    if core is None:
        return reference_split(values, high, low)
    ties = core.split(
        values=values.data_ptr(),
        high=high.data_ptr(),
        low=low.data_ptr(),
        numel=values.numel(),
        threads=torch.get_num_threads(),
    )
    return torch.tensor(ties, dtype=torch.int64)


def merge(high: Tensor, low: Tensor, ties: Tensor, values: Tensor) -> None:
    """Give ``values`` what ``split`` held in ``high`` and ``low`` and returned."""
    core = _load()[0] if values.device.type == "cpu" else None
    if core is None:
        reference_merge(high, low, ties, values)
        return
    core.merge(
        high=high.data_ptr(),
        low=low.data_ptr(),
        values=values.data_ptr(),
        numel=values.numel(),
        threads=torch.get_num_threads(),
    )
    if ties.numel():
        values.view(torch.int32)[ties] -= 0x10000


def reference_split(values: Tensor, high: Tensor, low: Tensor) -> Tensor:
    """``split`` in plain torch."""
    bits = values.view(torch.int32)
    high.copy_(values)
    low.copy_(bits << 16 >> 16)
    return (((bits & 0x1FFFF) == 0x18000) & ~values.isnan()).nonzero().view(-1)


def reference_merge(high: Tensor, low: Tensor, ties: Tensor, values: Tensor) -> None:
    """``merge`` in plain torch."""
    lower = low.int() & 0xFFFF
    bits = values.view(torch.int32)
    bits.copy_(((high.view(torch.int16).int() - (lower > 0x8000).int()) << 16) | lower)
    bits[ties] -= 0x10000
