from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from deepspeed.profiling.flops import FlopsProfiler, get_model_profile
from deepspeed.profiling.flops_report import number_to_string


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def profiled(model: nn.Module, *inputs: Any) -> FlopsProfiler:
    profiler = FlopsProfiler(model)
    profiler.start_profile()
    model(*inputs)
    profiler.stop_profile()
    return profiler


class Attention(nn.Module):
    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(size, 3 * size), nn.Linear(size, size)

    def forward(self, x: Tensor) -> Any:
        batch, length, size = x.shape
        q, k, v = (t.view(batch, length, self.heads, -1).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        attended = functional.scaled_dot_product_attention(q, k, v)
        return SimpleNamespace(loss=None, logits=self.out(attended.transpose(1, 2).reshape(batch, length, size)))


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_a_linear_network_counts_rows_times_inputs_times_outputs(context: Any) -> None:
    model = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 5, bias=False))
    with context():
        profiler = profiled(model, torch.randn(4, 10))
    macs = 4 * 10 * 20 + 4 * 20 * 5
    assert profiler.get_total_macs() == macs
    assert profiler.get_total_flops() == 2 * macs
    assert profiler.get_total_params() == 10 * 20 + 20 + 20 * 5
    assert [child.macs for child in profiler.profile().children] == [800, 0, 400]
    duration = profiler.get_total_duration()
    assert isinstance(duration, float)
    assert duration > 0


@pytest.mark.parametrize("context", [torch.enable_grad, torch.inference_mode])
def test_attention_counts_its_two_products_and_its_projections(context: Any) -> None:
    batch, length, size = 2, 6, 16
    with context():
        profiler = profiled(Attention(size, heads=4), torch.randn(batch, length, size))
    projections = batch * length * size * 4 * size
    assert profiler.get_total_macs() == projections + 2 * batch * length * length * size


def test_a_transformer_layer_counts_the_same_in_evaluation_where_its_attention_is_one_kernel() -> None:
    layer, x = nn.TransformerEncoderLayer(16, 2, batch_first=True), torch.randn(2, 5, 16)
    trained = profiled(layer, x).get_total_macs()
    layer.eval()
    with torch.no_grad():
        assert profiled(layer, x).get_total_macs() == trained


def test_a_convolution_counts_kernel_elements_per_output_element() -> None:
    profiler = profiled(nn.Conv2d(3, 8, kernel_size=3, padding=1), torch.randn(2, 3, 5, 7))
    assert profiler.get_total_macs() == 2 * 8 * 5 * 7 * 3 * 9


def test_a_matrix_times_a_vector_is_counted() -> None:
    assert profiled(nn.Linear(6, 7, bias=False), torch.randn(6)).get_total_macs() == 42


def test_a_shared_module_counts_once_in_parameters_and_each_time_in_operations() -> None:
    layer = nn.Linear(8, 8)
    profiler = profiled(nn.Sequential(layer, nn.Sequential(layer, nn.Tanh())), torch.randn(3, 8))
    root = profiler.profile()
    assert (root.macs, root.parameters) == (2 * 3 * 64, 72)
    assert root.children[0].calls == 2


def test_a_module_list_sums_the_layers_that_its_owner_calls() -> None:
    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    (layers,) = profiled(Stack(), torch.randn(2, 4)).profile().children
    assert (layers.kind, layers.macs, layers.calls) == ("ModuleList", 3 * 2 * 16, 0)


@pytest.mark.parametrize("reentrant", [False, True])
def test_backward_and_recomputed_forwards_are_not_counted(reentrant: bool) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(5, 5)

        def forward(self, x: Tensor) -> Any:
            return checkpoint(self.inner, x, use_reentrant=reentrant)

    model = Checkpointed()
    profiler = FlopsProfiler(model)
    profiler.start_profile()
    model(torch.randn(2, 5, requires_grad=True)).sum().backward()
    profiler.stop_profile()
    assert profiler.get_total_macs() == 50
    assert profiler.profile().children[0].calls == 1


def test_profiling_changes_no_output_and_leaves_no_hook() -> None:
    model, x = Attention(16, 2), torch.randn(2, 3, 16)
    expected = model(x).logits
    profiler = FlopsProfiler(model)
    profiler.start_profile()
    assert hooks(model) > 0
    assert torch.equal(model(x).logits, expected)
    with pytest.raises(RuntimeError, match="called twice"):
        profiler.start_profile()
    profiler.end_profile()
    assert hooks(model) == 0
    assert profiler.get_total_macs() == 0


def test_a_forward_that_raises_leaves_the_profiler_usable() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    profiler = FlopsProfiler(model)
    profiler.start_profile()
    with pytest.raises(RuntimeError):
        model(torch.randn(2, 5))
    torch.randn(9, 9) @ torch.randn(9, 9)
    profiler.reset_profile()
    model(torch.randn(2, 4))
    profiler.end_profile()
    profiler.start_profile()
    model(torch.randn(2, 4))
    profiler.stop_profile()
    assert profiler.get_total_macs() == 2 * 2 * 16


def test_ignored_modules_are_left_out_with_all_that_runs_in_them() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Attention(4, 1))
    _, macs, _ = get_model_profile(
        model, (1, 2, 4), print_profile=False, as_string=False, ignore_modules=[Attention]
    )
    assert macs == 2 * 16
    assert hooks(model) == 0


def test_get_model_profile_returns_text_or_numbers_and_writes_the_table(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(100, 100), nn.Linear(100, 100))
    path = tmp_path / "profile.txt"
    texts = get_model_profile(model, (10, 100), output_file=str(path))
    assert texts == ("400.00 KFLOPs", "200.00 KMACs", "20.20 K")
    numbers = get_model_profile(model, args=[torch.ones(10, 100)], as_string=False, print_profile=False)
    assert numbers == (400_000, 200_000, 20_200)
    table = path.read_text()
    assert "(1): Linear" in table
    assert table.count("50.00%") >= 4
    assert "MACs        - {'Sequential': '200.00 KMACs'}" in table


def test_depth_and_detail_limit_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(3, 3)))
    get_model_profile(model, (1, 3), module_depth=1)
    printed = capsys.readouterr().out
    assert "(0): Sequential" in printed
    assert "Linear" not in printed
    get_model_profile(model, (1, 3), detailed=False)
    assert "Detailed" not in capsys.readouterr().out


def test_generate_is_profiled_over_all_its_forwards() -> None:
    class Generator(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x)

        def generate(self, x: Tensor) -> Tensor:
            return self(self(self(x)))

    _, macs, _ = get_model_profile(
        Generator(), kwargs={"x": torch.ones(1, 4)}, mode="generate", as_string=False, print_profile=False
    )
    assert macs == 3 * 16


def test_the_report_has_the_engines_batch_size(capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Linear(2, 2)
    profiler = FlopsProfiler(model, SimpleNamespace(train_micro_batch_size_per_gpu=lambda: 17))
    profiler.start_profile()
    model(torch.ones(17, 2))
    profiler.print_model_profile(profile_step=3)
    profiler.end_profile()
    printed = capsys.readouterr().out
    assert "at step 3" in printed
    assert "17" in printed.split("batch size per GPU:")[1].splitlines()[0]


def test_bad_requests_say_what_to_give() -> None:
    with pytest.raises(ValueError, match="give input_shape, args or kwargs"):
        get_model_profile(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="got 'train'"):
        get_model_profile(nn.Linear(2, 2), (1, 2), mode="train")


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [(0, "", "0"), (336.23e6, "", "336.23 M"), (76.39e-3, "s", "76.39 ms"), (34.09e-6, "s", "34.09 us"), (7, "", "7")],
)
def test_numbers_are_written_with_decimal_prefixes(value: float, unit: str, text: str) -> None:
    assert number_to_string(value, unit) == text
