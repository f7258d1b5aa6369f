"""Time of the kernels over flat tensors: deepspeed's, torch's doing the same work, and memory's for the same bytes.

::

    python benchmarks/kernels.py --numel 16777216 --rounds 15

In one thread. The candidates of a case take turns, so that a machine that slows down slows all of them, and what they have
made is compared at the end: a candidate that did other work is an error, not a figure. Memory's own time is that of reading
and writing as many bytes in all as the kernel must: by a copy, whose target is read first by the processor though nobody asks
for it, and in place.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepspeed import native
from deepspeed.ops.adagrad import DeepSpeedCPUAdagrad
from deepspeed.optim.adam import AdamW
from deepspeed.optim.lion import Lion

LR, WEIGHT_DECAY, CLIP = 1e-3, 0.01, 0.5
BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32
ROUNDING = {FLOAT32: 1e-4, BFLOAT16: 1e-2}
"""How far the same formula may be apart: roots and quotients round differently, and between two bf16 either may be next."""

Make = Callable[[list[Tensor]], torch.optim.Optimizer]


@dataclass(frozen=True)
class Candidate:
    """``run`` does the work once; ``result`` is what it has made so far, to be compared."""

    run: Callable[[], object]
    result: Callable[[], Tensor]


@dataclass(frozen=True)
class Case:
    """The same work by several candidates, the first of them ours. ``nbytes`` is what one run must read and write;
    results may differ by ``tolerance``, relative."""

    name: str
    nbytes: int
    candidates: dict[str, Candidate]
    tolerance: float


class ForeachLion(torch.optim.Optimizer):
    """Lion in torch's multi-tensor operations, since torch has none of its own."""

    def __init__(self, params: Iterable[Tensor]):
        super().__init__(params, {})
        self.tensors = self.param_groups[0]["params"]
        self.momentums = [torch.zeros_like(tensor) for tensor in self.tensors]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter."""
        gradients = [tensor.grad for tensor in self.tensors]
        directions = torch._foreach_lerp(gradients, self.momentums, 0.9)
        torch._foreach_sign_(directions)
        torch._foreach_mul_(self.tensors, 1 - LR * WEIGHT_DECAY)
        torch._foreach_add_(self.tensors, directions, alpha=-LR)
        torch._foreach_lerp_(self.momentums, gradients, 1 - 0.99)


def random(numel: int, seed: int, dtype: torch.dtype = FLOAT32) -> Tensor:
    """Normal numbers, the same for all candidates."""
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed)).to(dtype)


def optimizer_candidate(make: Make, numel: int, dtype: torch.dtype) -> Candidate:
    """An optimizer on one flat fp32 tensor. With bf16 gradients they are scaled (unscaled and clipped) first, and the
    model's bf16 parameters are written after: by the kernel where it can, by torch's operations where not."""
    parameter, gradient = random(numel, 0), random(numel, 1, dtype)
    scale, out = (CLIP, torch.empty(numel, dtype=dtype)) if dtype == BFLOAT16 else (1.0, None)
    optimizer = make([parameter])

    def in_one_pass() -> None:
        optimizer.step_shard(parameter, gradient, gradient_scale=scale, out=out)  # type: ignore[attr-defined]

    def by_torch() -> None:
        parameter.grad = gradient if out is None else gradient.to(FLOAT32).mul_(scale)
        optimizer.step()
        if out is not None:
            out.copy_(parameter)

    return Candidate(in_one_pass if hasattr(optimizer, "step_shard") else by_torch, lambda: parameter if out is None else out)


def optimizer_cases(numel: int) -> Iterator[Case]:
    """Adam, Lion and Adagrad: fp32 alone, and with bf16 gradients and parameters."""
    adamw, adagrad = torch.optim.AdamW, torch.optim.Adagrad
    makers: dict[str, tuple[int, dict[str, Make]]] = {
        "AdamW": (
            2,
            {
                "deepspeed": lambda p: AdamW(p, lr=LR, weight_decay=WEIGHT_DECAY),
                "torch fused": lambda p: adamw(p, lr=LR, weight_decay=WEIGHT_DECAY, fused=True),
                "torch foreach": lambda p: adamw(p, lr=LR, weight_decay=WEIGHT_DECAY, foreach=True),
            },
        ),
        "Lion": (
            1,
            {"deepspeed": lambda p: Lion(p, lr=LR, weight_decay=WEIGHT_DECAY), "torch foreach": ForeachLion},
        ),
        "Adagrad": (
            1,
            {
                "deepspeed": lambda p: DeepSpeedCPUAdagrad(p, lr=LR),
                "torch fused": lambda p: adagrad(p, lr=LR, fused=True),
                "torch foreach": lambda p: adagrad(p, lr=LR, foreach=True),
            },
        ),
    }
    for name, (states, candidates) in makers.items():
        for dtype, other_nbytes in ((FLOAT32, 4), (BFLOAT16, 2 + 2)):  # of the gradient, and of the 16-bit parameter
            nbytes = numel * (8 + 8 * states + other_nbytes)
            made = {key: optimizer_candidate(make, numel, dtype) for key, make in candidates.items()}
            yield Case(f"{name} {short(dtype)}", nbytes, made, ROUNDING[dtype])


def sum_case(numel: int, dtype: torch.dtype) -> Case:
    """``out = scale * (a + b)``, as in a reduce-scatter's local sum."""
    a, b = random(numel, 0, dtype), random(numel, 1, dtype)
    ours, theirs = torch.empty_like(a), torch.empty_like(a)
    candidates = {
        "deepspeed": Candidate(lambda: native.scaled_sum([a, b], out=ours, scale=CLIP), lambda: ours),
        "torch": Candidate(lambda: torch.add(a, b, out=theirs).mul_(CLIP), lambda: theirs),
    }
    return Case(f"scaled_sum {short(dtype)}", 3 * a.nbytes, candidates, ROUNDING[dtype])


def accumulating_case(numel: int) -> Case:
    """``out += scale * (a + b)`` in fp32, of bf16."""
    a, b = random(numel, 0, BFLOAT16), random(numel, 1, BFLOAT16)
    ours, theirs = torch.zeros(numel), torch.zeros(numel)
    candidates = {
        "deepspeed": Candidate(lambda: native.scaled_sum([a, b], out=ours, scale=CLIP, accumulate=True), lambda: ours),
        "torch": Candidate(lambda: theirs.add_(a.to(FLOAT32).add_(b), alpha=CLIP), lambda: theirs),
    }
    return Case("scaled_sum bf16 to fp32", 2 * a.nbytes + 2 * ours.nbytes, candidates, ROUNDING[FLOAT32])


def norm_case(numel: int, dtype: torch.dtype) -> Case:
    """The sum of squares, in which a non-finite element shows."""
    values = random(numel, 0, dtype)
    candidates = {
        "deepspeed": Candidate(lambda: native.squared_norm(values), lambda: torch.tensor(native.squared_norm(values)[0])),
        "torch": Candidate(lambda: torch_squared_norm(values), lambda: torch.tensor(torch_squared_norm(values))),
    }
    # Ours adds up in fp64 and torch's in fp32: of 16 M elements it is wrong by a thousandth.
    return Case(f"squared_norm {short(dtype)}", values.nbytes, candidates, 1e-2)


def torch_squared_norm(values: Tensor) -> float:
    """The same by torch's norm, accumulated in fp32."""
    return float(torch.linalg.vector_norm(values, dtype=FLOAT32).item()) ** 2


def cases(numel: int) -> Iterator[Case]:
    """All cases, one after another: one at a time is in memory."""
    yield from optimizer_cases(numel)
    for dtype in (FLOAT32, BFLOAT16):
        yield sum_case(numel, dtype)
    yield accumulating_case(numel)
    for dtype in (FLOAT32, BFLOAT16):
        yield norm_case(numel, dtype)


def short(dtype: torch.dtype) -> str:
    """The dtype in the words of the table."""
    return {FLOAT32: "fp32", BFLOAT16: "bf16"}[dtype]


def measure(case: Case, rounds: int) -> list[dict[str, Any]]:
    """Rows of median milliseconds for memory and each candidate. AssertionError where results differ."""
    source, target = torch.ones(case.nbytes // 8), torch.ones(case.nbytes // 8)
    memory = {"copy": lambda: target.copy_(source), "in place": lambda: target.neg_()}
    runs = memory | {name: candidate.run for name, candidate in case.candidates.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):  # the first is warm-up
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if number:
                times[name].append((time.perf_counter() - start) * 1e3)
    check_equal(case)
    medians = {name: statistics.median(values) for name, values in times.items()}
    limit = min(medians[name] for name in memory)
    return [
        {
            "case": case.name,
            "candidate": name,
            "milliseconds": milliseconds,
            "gigabytes_per_second": case.nbytes / milliseconds / 1e6,
            "times_memory": milliseconds / limit,
            "times_ours": milliseconds / medians["deepspeed"],
        }
        for name, milliseconds in medians.items()
    ]


def check_equal(case: Case) -> None:
    """Raise AssertionError unless all candidates have made the same of as many runs."""
    ours = case.candidates["deepspeed"].result().to(FLOAT32)
    for name, candidate in case.candidates.items():
        result = candidate.result().to(FLOAT32)
        wrong = (result - ours).abs() > case.tolerance * (ours.abs() + ours.abs().mean())
        assert result.isfinite().all() and not wrong.any(), (
            f"{case.name}: {name} and deepspeed differ in {wrong.sum()} elements"
        )


def print_rows(rows: list[dict[str, Any]]) -> None:
    """One line per candidate; below 1 in the last column is faster than ours."""
    for row in rows:
        name = row["case"] if row["candidate"] == "copy" else ""
        print(f"{name:24} {row['candidate']:14} {row['milliseconds']:9.3f} {row['gigabytes_per_second']:7.1f} ", end="")
        print(f"{row['times_memory']:8.2f} {row['times_ours']:7.2f}", flush=True)


def main() -> None:
    """Measure all cases and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numel", type=int, default=1 << 24, help="elements of each tensor (default 16777216)")
    parser.add_argument("--rounds", type=int, default=15, help="timed runs of each candidate (default 15)")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{options.numel} elements, one thread, {native.status()}, torch {torch.__version__}")
    print(f"{'':24} {'':14} {'ms':>9} {'GB/s':>7} {'x memory':>8} {'x ours':>7}")
    rows = []
    for case in cases(options.numel):
        found = measure(case, options.rounds)
        print_rows(found)
        rows += found
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
