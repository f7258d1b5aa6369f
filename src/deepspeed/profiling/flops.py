"""The flops profiler: parameters, multiply-accumulate operations and forward time of every module.

Operations are counted where they are dispatched, by a mode that is active only while a profiled module runs forward;
nothing in torch is replaced. Matrix products, convolutions and attention are counted, by torch's own formulas;
elementwise operations are not: they take memory bandwidth, not arithmetic. One multiply-accumulate (MAC) is two
floating-point operations (flops). Backward is not measured; it takes about twice the flops of forward. A module's
figures include its children's, over all its calls; a shared module counts in each parent that calls it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from .flops_report import ModuleProfile, Summary, number_to_string, render

_aten = torch.ops.aten


def _vector_product_flops(*operands: Any, out_val: torch.Tensor) -> int:
    """Matrix (rows, columns) times vector (columns), or the dot product of two vectors: the last operands."""
    matrix = operands[-2]
    return 2 * int(matrix.numel())


def _vector_addition_flops(bias: Any, matrix: torch.Tensor, vector: Any, *, out_val: torch.Tensor, **_: Any) -> int:
    """``addmv``: the product of a matrix (rows, columns) and a vector (columns)."""
    return 2 * matrix.numel()


def _fused_attention_flops(query: torch.Tensor, key: torch.Tensor, *_: Any, out_val: Any, **__: Any) -> int:
    """``nn.MultiheadAttention`` in one kernel, as without autograd: four projections and two products.
    Query (batch, length, size), key (batch, source, size)."""
    batch, length, size = query.shape
    source = key.shape[1]
    return 2 * batch * (2 * length * size * size + 2 * source * size * size + 2 * length * source * size)


_FORMULAS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    # torch has the formula of this operator only under its CUDA name.
    _aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[_aten._scaled_dot_product_flash_attention],
    _aten.mv: _vector_product_flops,
    _aten.dot: _vector_product_flops,
    _aten.addmv: _vector_addition_flops,
    _aten._native_multi_head_attention: _fused_attention_flops,
}


@dataclass
class _Count:
    """What one module has used over all its calls."""

    flops: int = 0
    seconds: float = 0.0
    calls: int = 0


class _OperationCounter(TorchDispatchMode):
    """Reports the flops of each dispatched operation to ``count``."""

    supports_higher_order_operators = True

    def __init__(self, count: Callable[[int], None]):
        super().__init__()
        self._count = count

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        formula = _FORMULAS.get(getattr(func, "_overloadpacket", func))
        if formula is None and isinstance(func, torch._ops.OpOverload) and func is not torch.ops.prim.device.default:
            # Without autograd, composite operators such as linear and matmul arrive whole.
            with self:
                decomposed = func.decompose(*args, **kwargs)
            if decomposed is not NotImplemented:
                return decomposed
        output = func(*args, **kwargs)
        if formula is not None:
            self._count(int(formula(*args, **kwargs, out_val=output)))
        return output


class FlopsProfiler:
    """Profiles the forward passes of ``model`` between ``start_profile`` and ``stop_profile``.

    With ``ds_engine``, the training engine that runs the model, the report has its batch size and samples per second.
    Works with and without autograd. What activation checkpointing recomputes in backward is not counted again.
    """

    def __init__(self, model: nn.Module, ds_engine: Any = None):
        self.model = model
        self.ds_engine = ds_engine
        self.started = False
        self._counts: dict[nn.Module, _Count] = {}
        self._running: list[tuple[nn.Module, float]] = []
        self._ignored: tuple[type[nn.Module], ...] = ()
        self._handles: list[Any] = []
        self._mode: _OperationCounter | None = None
        self._synchronize = _synchronizer(model)

    def start_profile(self, ignore_list: Sequence[type[nn.Module]] | None = None) -> None:
        """Begin counting, from zero. Modules of the classes in ``ignore_list``, with all that runs within them, are
        left out. Raises RuntimeError where the profiler already runs."""
        if self.started:
            raise RuntimeError("start_profile() was called twice: call stop_profile() or end_profile() first")
        self.reset_profile()
        self._ignored = tuple(ignore_list or ())
        for module in self.model.modules():
            self._handles.append(module.register_forward_pre_hook(self._enter, prepend=True))
            self._handles.append(module.register_forward_hook(self._leave, always_call=True))
        self.started = True

    def stop_profile(self) -> None:
        """Stop counting and remove every hook; what was counted stays. Does nothing where the profiler is stopped."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._running.clear()
        self._leave_mode()
        self.started = False

    def reset_profile(self) -> None:
        """Set all counts to zero."""
        self._counts = {}

    def end_profile(self) -> None:
        """Stop counting and forget what was counted."""
        self.stop_profile()
        self.reset_profile()

    def get_total_flops(self, as_string: bool = False) -> int | str:
        """Floating-point operations of the forward passes, as a number or as text such as ``6.28 TFLOPs``."""
        flops = 2 * self.profile().macs
        return number_to_string(flops, "FLOPs") if as_string else flops

    def get_total_macs(self, as_string: bool = False) -> int | str:
        """Multiply-accumulate operations of the forward passes, as a number or as text such as ``3.14 TMACs``."""
        macs = self.profile().macs
        return number_to_string(macs, "MACs") if as_string else macs

    def get_total_duration(self, as_string: bool = False) -> float | str:
        """Seconds of the forward passes, as a number or as text such as ``76.67 ms``."""
        seconds = self.profile().seconds
        return number_to_string(seconds, "s") if as_string else seconds

    def get_total_params(self, as_string: bool = False) -> int | str:
        """Parameters of the model, tied ones once, as a number or as text such as ``336.23 M``."""
        parameters = self.profile().parameters
        return number_to_string(parameters) if as_string else parameters

    def profile(self) -> ModuleProfile:
        """The figures of the model and, below it, of its modules."""
        return self._profile_of(self.model, "")

    def print_model_profile(
        self,
        profile_step: int = 1,
        module_depth: int = -1,
        top_modules: int = 1,
        detailed: bool = True,
        output_file: str | None = None,
    ) -> None:
        """Print the summary, the ``top_modules`` of each depth and, where ``detailed``, the table of all modules.

        ``module_depth`` is the depth to which modules are shown (-1 for all); ``profile_step`` is the step that the
        heading names. The report goes to ``output_file``, which is overwritten, or to standard output.
        """
        text = render(
            self.profile(),
            Summary(step=profile_step, world_size=_world_size(), batch_size=self._batch_size()),
            module_depth=module_depth,
            top_modules=top_modules,
            detailed=detailed,
        )
        if output_file is None:
            print(text)
            return
        Path(output_file).write_text(text + "\n", encoding="utf-8")

    def _batch_size(self) -> int | None:
        return None if self.ds_engine is None else int(self.ds_engine.train_micro_batch_size_per_gpu())

    def _profile_of(self, module: nn.Module, name: str) -> ModuleProfile:
        children = tuple(self._profile_of(child, child_name) for child_name, child in module.named_children())
        count = self._counts.get(module, _Count())
        if not count.calls and not isinstance(module, self._ignored):
            # A container such as ModuleList is never called itself.
            count = _Count(2 * sum(child.macs for child in children), sum(child.seconds for child in children))
        return ModuleProfile(
            name=name,
            kind=type(module).__name__,
            parameters=sum(int(getattr(p, "ds_numel", p.numel())) for p in module.parameters()),
            macs=count.flops // 2,
            seconds=count.seconds,
            calls=count.calls,
            children=children,
        )

    def _enter(self, module: nn.Module, _inputs: Any) -> None:
        if _in_backward():
            return
        if self._mode is None:
            self._mode = _OperationCounter(self._add)
            self._mode.__enter__()
        self._synchronize()
        self._running.append((module, time.perf_counter()))

    def _leave(self, module: nn.Module, _inputs: Any, _output: Any) -> None:
        if _in_backward() or not any(running is module for running, _ in self._running):
            return
        self._synchronize()
        now = time.perf_counter()
        while True:
            left, started = self._running.pop()
            if left is module:
                break
        around = [running for running, _ in self._running]
        if not isinstance(module, self._ignored) and not any(isinstance(outer, self._ignored) for outer in around):
            count = self._counts.setdefault(module, _Count())
            count.calls += 1
            if not any(outer is module for outer in around):
                count.seconds += now - started
        if not self._running:
            self._leave_mode()

    def _leave_mode(self) -> None:
        mode, self._mode = self._mode, None
        if mode is not None:
            mode.__exit__(None, None, None)

    def _add(self, flops: int) -> None:
        running = {module for module, _ in self._running}
        if _in_backward() or any(isinstance(module, self._ignored) for module in running):
            return
        for module in running:
            self._counts.setdefault(module, _Count()).flops += flops


def get_model_profile(
    model: nn.Module,
    input_shape: Sequence[int] | None = None,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    print_profile: bool = True,
    detailed: bool = True,
    module_depth: int = -1,
    top_modules: int = 1,
    warm_up: int = 1,
    as_string: bool = True,
    output_file: str | None = None,
    ignore_modules: Sequence[type[nn.Module]] | None = None,
    mode: str = "forward",
) -> tuple[int | str, int | str, int | str]:
    """Run ``model`` once and return ``(flops, macs, parameters)``, as text or as numbers.

    The input is ``args`` and ``kwargs``, or a tensor of ones of ``input_shape`` in the dtype and on the device of the
    first parameter. ``warm_up`` runs come before the measured one. ``mode`` "generate" runs ``model.generate`` in
    place of the model. The other arguments are those of ``FlopsProfiler``'s methods. Raises ValueError where there is
    no input or ``mode`` is unknown.
    """
    if mode not in ("forward", "generate"):
        raise ValueError(f"mode must be 'forward' or 'generate', got {mode!r}")
    if input_shape is not None:
        first = next(model.parameters(), torch.empty(0))
        args = [torch.ones(*input_shape, dtype=first.dtype, device=first.device)]
    keywords = kwargs or {}
    if not args and not keywords:
        raise ValueError("get_model_profile needs an input: give input_shape, args or kwargs")
    run: Callable[..., Any] = model if mode == "forward" else getattr(model, "generate")  # noqa: B009
    for _ in range(warm_up):
        run(*args, **keywords)
    profiler = FlopsProfiler(model)
    profiler.start_profile(ignore_list=ignore_modules)
    try:
        run(*args, **keywords)
        profiler.stop_profile()
        if print_profile:
            profiler.print_model_profile(
                module_depth=module_depth, top_modules=top_modules, detailed=detailed, output_file=output_file
            )
        return (
            profiler.get_total_flops(as_string),
            profiler.get_total_macs(as_string),
            profiler.get_total_params(as_string),
        )
    finally:
        profiler.end_profile()


def _in_backward() -> bool:
    """Whether autograd is running a backward in this thread."""
    return bool(torch._C._current_graph_task_id() != -1)


def _synchronizer(model: nn.Module) -> Callable[[], None]:
    """What waits for the model's device; nothing has to where operations are synchronous."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if device.type in ("cpu", "meta"):
        return lambda: None
    return lambda: torch.accelerator.synchronize(device)


def _world_size() -> int:
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
