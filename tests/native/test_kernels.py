from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deepspeed.native import AdagradHyper, AdamHyper, LionHyper, fused, kernels, reference

HYPER = AdamHyper(step=7, lr=1e-2, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1, grad_scale=0.5)
VARIANTS = {
    "decoupled": HYPER,
    "l2": replace(HYPER, decoupled=False),
    "without decay": replace(HYPER, weight_decay=0.0, grad_scale=1.0),
    "without bias correction": replace(HYPER, bias_correction=False),
}
SIZES = (1, 7, 511, 512, 513, 70_001)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CORE = kernels._load()[0]
compiled = pytest.mark.skipif(CORE is None, reason=kernels.status())
INSTRUCTION_SETS = CORE.instruction_sets() if CORE else []


@pytest.fixture(params=INSTRUCTION_SETS)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    assert CORE is not None, "no parameters without a core"
    before = CORE.instruction_set()
    CORE.select(request.param)
    yield request.param
    CORE.select(before)


def randn(numel: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed)).to(dtype)


def adam_tensors(numel: int, gradient_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return randn(numel, 0), randn(numel, 1, gradient_dtype), randn(numel, 2), randn(numel, 3).square()


def check_adam(step: Callable[..., None], numel: int, dtype: torch.dtype, hyper: AdamHyper) -> None:
    ours, theirs = adam_tensors(numel, dtype), adam_tensors(numel, dtype)
    out = None if dtype == torch.float32 else torch.empty(numel, dtype=dtype)
    step(*ours, hyper=hyper, param_out=out)
    reference.adam_step(*theirs, hyper=hyper)
    for mine, plain in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-5, atol=1e-7)
    if out is not None:
        assert torch.equal(out, ours[0].to(dtype))


def test_the_reference_adam_step_is_what_torch_does() -> None:
    parameter = torch.nn.Parameter(randn(1000, 0))
    optimizer = torch.optim.AdamW([parameter], lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1)
    mine, moments = randn(1000, 0), (torch.zeros(1000), torch.zeros(1000))
    for step in range(1, 6):
        parameter.grad = randn(1000, step)
        optimizer.step()
        reference.adam_step(mine, randn(1000, step), *moments, hyper=replace(HYPER, step=step, grad_scale=1.0))
    torch.testing.assert_close(mine, parameter.data, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_adam_in_each_instruction_set_is_the_reference_step(
    instruction_set: str, variant: str, dtype: torch.dtype
) -> None:
    for numel in SIZES:
        check_adam(kernels.adam_step, numel, dtype, VARIANTS[variant])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", ["decoupled", "l2", "without decay"])
def test_adam_on_the_fused_kernel_of_torch_is_the_reference_step(variant: str, dtype: torch.dtype) -> None:
    for numel in SIZES:
        check_adam(fused.adam_step, numel, dtype, VARIANTS[variant])


@pytest.mark.parametrize("variant", VARIANTS)
def test_without_the_core_adam_still_steps(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_load", lambda: (None, "not compiled"))
    assert not kernels.available()
    check_adam(kernels.adam_step, 1000, torch.bfloat16, VARIANTS[variant])


LION = LionHyper(lr=1e-2, beta1=0.9, beta2=0.99, weight_decay=0.1, grad_scale=0.5)
ADAGRAD = AdagradHyper(step=7, lr=1e-2, lr_decay=0.1, eps=1e-10, weight_decay=0.1, grad_scale=0.5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("param_dtype", DTYPES)
@pytest.mark.parametrize(("name", "hyper"), [("lion_step", LION), ("adagrad_step", ADAGRAD)])
def test_lion_and_adagrad_are_the_reference_step(
    instruction_set: str, name: str, hyper: object, param_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    # torch's square root may be off by one, which a 16-bit number shows where it is between two.
    exact = name == "lion_step"
    relative = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
    for numel in SIZES:
        results = []
        for implementation in (kernels, reference):
            param, grad, state = randn(numel, 0, param_dtype), randn(numel, 1, dtype), randn(numel, 2).square()
            out = torch.empty(numel, dtype=dtype)
            getattr(implementation, name)(param, grad, state, hyper=hyper, param_out=out)
            results.append((param, state, out))
        for ours, plain in zip(*results, strict=True):
            torch.testing.assert_close(ours, plain, rtol=0 if exact else relative[ours.dtype], atol=0 if exact else 1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adam_steps_16_bit_parameters_with_fp32_states(instruction_set: str, dtype: torch.dtype) -> None:
    ours, theirs = ([t.clone() for t in adam_tensors(1000, dtype)] for _ in range(2))
    for tensors, step in ((ours, kernels.adam_step), (theirs, reference.adam_step)):
        tensors[0] = tensors[0].to(dtype)
        step(*tensors, hyper=HYPER)
    for mine, plain in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-5 if mine.dtype == torch.float32 else 1e-2, atol=1e-7)


def test_the_fused_step_leaves_the_gradient_as_it_was() -> None:
    param, grad, first, second = adam_tensors(100, torch.float32)
    fused.adam_step(param, grad, first, second, hyper=HYPER)
    assert torch.equal(grad, randn(100, 1))


@compiled
def test_every_instruction_set_gives_the_same_bits() -> None:
    assert CORE is not None, "skipped without a core"
    results = []
    threads = torch.get_num_threads()
    for name in INSTRUCTION_SETS:
        CORE.select(name)
        torch.set_num_threads(1 + len(results))
        tensors = adam_tensors(700_001, torch.bfloat16)
        out = torch.empty(700_001, dtype=torch.float16)
        kernels.adam_step(*tensors, hyper=HYPER, param_out=out)
        torch.set_num_threads(threads)
        results.append([*tensors, out])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@settings(max_examples=60, deadline=None)
@given(
    numel=st.integers(0, 3000),
    count=st.integers(1, 5),
    dtype=st.sampled_from(DTYPES),
    wide=st.booleans(),
    scale=st.sampled_from([1.0, 0.25, 1 / 3]),
)
def test_a_scaled_sum_is_bit_for_bit_the_fp32_expression(
    numel: int, count: int, dtype: torch.dtype, wide: bool, scale: float
) -> None:
    inputs = [randn(numel, seed, dtype) for seed in range(count)]
    total = inputs[0].float()
    for tensor in inputs[1:]:
        total = total + tensor.float()
    expected = (total * scale).to(torch.float32 if wide else dtype)
    for implementation in (kernels.scaled_sum, reference.scaled_sum):
        out = torch.empty_like(expected)
        implementation(inputs, out=out, scale=scale)
        assert torch.equal(out, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_scaled_sum_accumulates_in_fp32_and_may_write_into_its_inputs(instruction_set: str, dtype: torch.dtype) -> None:
    inputs = [randn(70_001, 1, dtype), randn(70_001, 2, dtype)]
    total = (inputs[0].float() + inputs[1].float()) * 0.5
    accumulated = randn(70_001, 3)
    kernels.scaled_sum(inputs, out=accumulated, scale=0.5, accumulate=True)
    assert torch.equal(accumulated, randn(70_001, 3) + total)
    kernels.scaled_sum(inputs, out=inputs[1], scale=0.5)
    assert torch.equal(inputs[1], total.to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrowing_rounds_as_torch_does_for_every_kind_of_number(instruction_set: str, dtype: torch.dtype) -> None:
    bits = torch.randint(-(2**31), 2**31 - 1, (200_000,), generator=torch.Generator().manual_seed(0))
    values = bits.to(torch.int32).view(torch.float32)
    special = torch.tensor([0.0, -0.0, 65504.0, 65519.9, 65520.0, 6e-8, 2e-8, 1e-45, float("inf"), -float("inf")])
    values = torch.cat([values[values.isfinite()], special])
    out, zero = torch.empty(values.numel(), dtype=dtype), torch.zeros(values.numel())
    kernels.adam_step(values, zero, zero.clone(), zero.clone(), hyper=replace(HYPER, weight_decay=0.0), param_out=out)
    assert torch.equal(out, values.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_squared_norm_is_that_of_fp64(instruction_set: str, dtype: torch.dtype) -> None:
    for numel in SIZES:
        values = randn(numel, 0, dtype)
        total, finite = kernels.squared_norm(values)
        assert finite
        assert total == pytest.approx(values.double().square().sum().item(), rel=1e-13)


@compiled
def test_the_squared_norm_does_not_depend_on_the_number_of_threads() -> None:
    values, threads = randn(2_000_003, 0), torch.get_num_threads()
    try:
        totals = []
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            totals.append(kernels.squared_norm(values)[0])
    finally:
        torch.set_num_threads(threads)
    assert len(set(totals)) == 1


@pytest.mark.parametrize("squared_norm", [kernels.squared_norm, reference.squared_norm])
def test_a_non_finite_element_is_noticed_and_a_large_one_is_not_taken_for_one(
    squared_norm: Callable[[Tensor], tuple[float, bool]],
) -> None:
    for value in (float("nan"), float("inf"), -float("inf")):
        values = torch.zeros(100_000)
        values[77_777] = value
        assert squared_norm(values)[1] is False
    total, finite = squared_norm(torch.full((1000,), 3e38))
    assert finite
    assert total == pytest.approx(9e79, rel=1e-3)


def test_a_tensor_that_does_not_fit_is_an_error_that_names_it() -> None:
    param, grad, first, second = adam_tensors(10, torch.float32)
    with pytest.raises(ValueError, match="grad has 9 elements and param 10"):
        kernels.adam_step(param, grad[:9], first, second, hyper=HYPER)
    with pytest.raises(ValueError, match="exp_avg must be 1-D and contiguous"):
        kernels.adam_step(param, grad, randn(20, 0)[::2], second, hyper=HYPER)
    with pytest.raises(TypeError, match=r"exp_avg_sq is torch\.float64"):
        kernels.adam_step(param, grad, first, second.double(), hyper=HYPER)
    with pytest.raises(ValueError, match="steps count from 1"):
        kernels.adam_step(param, grad, first, second, hyper=replace(HYPER, step=0))
    with pytest.raises(ValueError, match="needs at least one"):
        kernels.scaled_sum([], out=param)
    with pytest.raises(TypeError, match=r"out is torch\.bfloat16"):
        kernels.scaled_sum([param, grad], out=param.bfloat16())
