"""The memory estimators that print: the documented tables of model-state needs, for a live model or from counts."""

from __future__ import annotations

from torch import nn

from .estimate import estimate_zero2_model_states_mem_needs, estimate_zero3_model_states_mem_needs

_GIB = 2**30


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """``(all parameters, parameters of the largest layer)`` of ``model`` in elements, tied parameters once. A layer
    is what one module owns without its children. Parameters that stage 3 has partitioned count with their full size
    where they carry it (``ds_numel``)."""
    total = sum(_numel(parameter) for parameter in model.parameters())
    largest = max(
        (sum(_numel(parameter) for parameter in module.parameters(recurse=False)) for module in model.modules()),
        default=0,
    )
    return total, largest


def estimate_zero2_model_states_mem_needs_all_live(
    model: nn.Module, num_gpus_per_node: int = 1, num_nodes: int = 1, additional_buffer_factor: float = 1.5
) -> None:
    """Print what the model states of ``model`` need per machine and per device at stage 2, for every way to offload."""
    total, _ = count_parameters(model)
    estimate_zero2_model_states_mem_needs_all_cold(total, num_gpus_per_node, num_nodes, additional_buffer_factor)


def estimate_zero2_model_states_mem_needs_all_cold(
    total_params: float, num_gpus_per_node: int = 1, num_nodes: int = 1, additional_buffer_factor: float = 1.5
) -> None:
    """The same from the number of parameters alone."""
    lines = _header(num_gpus_per_node, num_nodes, f"{total_params / 1e6:.0f}M total params")
    for offload in (True, False):
        cpu_bytes, gpu_bytes = estimate_zero2_model_states_mem_needs(
            total_params, num_gpus_per_node, num_nodes, offload, additional_buffer_factor
        )
        lines.append(_row(cpu_bytes, gpu_bytes, f"offload_optimizer={_device(offload)}"))
    print("\n".join(lines))


def estimate_zero3_model_states_mem_needs_all_live(
    model: nn.Module, num_gpus_per_node: int = 1, num_nodes: int = 1, additional_buffer_factor: float = 1.5
) -> None:
    """Print what the model states of ``model`` need per machine and per device at stage 3, for every way to offload
    and with and without ``zero.Init``."""
    total, largest = count_parameters(model)
    estimate_zero3_model_states_mem_needs_all_cold(
        total, largest, num_gpus_per_node, num_nodes, additional_buffer_factor
    )


def estimate_zero3_model_states_mem_needs_all_cold(
    total_params: float,
    largest_layer_params: float,
    num_gpus_per_node: int = 1,
    num_nodes: int = 1,
    additional_buffer_factor: float = 1.5,
) -> None:
    """The same from the numbers of parameters, of the model and of its largest layer, alone."""
    sizes = f"{total_params / 1e6:.0f}M total params, {largest_layer_params / 1e6:.0f}M largest layer params"
    lines = _header(num_gpus_per_node, num_nodes, sizes)
    for offload_param, offload_optimizer in ((True, True), (False, True), (False, False)):
        for zero_init in (True, False):
            cpu_bytes, gpu_bytes, _ = estimate_zero3_model_states_mem_needs(
                total_params,
                largest_layer_params,
                num_gpus_per_node,
                num_nodes,
                offload_optimizer,
                offload_param,
                zero_init,
                additional_buffer_factor,
            )
            options = (
                f"offload_param={_device(offload_param)}, "
                f"offload_optimizer={_device(offload_optimizer)}, zero_init={int(zero_init)}"
            )
            lines.append(_row(cpu_bytes, gpu_bytes, options))
    print("\n".join(lines))


def _numel(parameter: nn.Parameter) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _header(num_gpus_per_node: int, num_nodes: int, sizes: str) -> list[str]:
    nodes = f"{num_nodes} node{'s' if num_nodes > 1 else ''}"
    gpus = f"{num_gpus_per_node} GPU{'s' if num_gpus_per_node > 1 else ''}"
    return [
        "Estimated memory needed for params, optim states and gradients for a:",
        f"HW: Setup with {nodes}, {gpus} per node.",
        f"SW: Model with {sizes}.",
        "  per CPU  |  per GPU |   Options",
    ]


def _row(cpu_bytes: float, gpu_bytes: float, options: str) -> str:
    return f"  {cpu_bytes / _GIB:7.2f}GB | {gpu_bytes / _GIB:6.2f}GB | {options}"


def _device(offload: bool) -> str:
    return "cpu " if offload else "none"
