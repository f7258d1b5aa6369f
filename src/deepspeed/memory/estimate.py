"""Model-state arithmetic: how many bytes the states of a model take per rank."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelStateBytes:
    """Bytes of model states on one rank, by kind."""

    parameters: float
    gradients: float
    master: float
    optimizer: float

    @property
    def total(self) -> float:
        """Bytes of all kinds together."""
        return self.parameters + self.gradients + self.master + self.optimizer


def model_state_bytes(
    parameters: int, *, stage: int, world_size: int, dtype_bytes: int, optimizer_states: int = 2
) -> ModelStateBytes:
    """The bytes that ``parameters`` trained elements take on each of ``world_size`` ranks under ZeRO ``stage``.

    Parameters and gradients have ``dtype_bytes`` bytes per element; below 4 bytes there is an fp32 master copy.
    The optimizer keeps ``optimizer_states`` fp32 values per element (2 for Adam, 1 for momentum). Padding and the
    buffers that live only during a step are not counted. Source: Rajbhandari et al., ZeRO (2020), figure 1.
    """
    sharded = 1 / world_size
    return ModelStateBytes(
        parameters=parameters * dtype_bytes * (sharded if stage >= 3 else 1),
        gradients=parameters * dtype_bytes * (sharded if stage >= 2 else 1),
        master=parameters * 4 * (sharded if stage >= 1 else 1) if dtype_bytes < 4 else 0.0,
        optimizer=parameters * 4 * optimizer_states * (sharded if stage >= 1 else 1),
    )


@dataclass(frozen=True)
class Cluster:
    """The hardware that an estimate is for: ``num_nodes`` machines of ``num_gpus_per_node`` devices each."""

    num_gpus_per_node: int = 1
    num_nodes: int = 1

    def __post_init__(self) -> None:
        for name in ("num_gpus_per_node", "num_nodes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def total_gpus(self) -> int:
        """Devices of all machines."""
        return self.num_gpus_per_node * self.num_nodes


def estimate_zero2_model_states_mem_needs(
    total_params: float,
    num_gpus_per_node: int = 1,
    num_nodes: int = 1,
    cpu_offload: bool = True,
    additional_buffer_factor: float = 1.5,
) -> tuple[float, float]:
    """Bytes ``(per CPU node, per GPU)`` of model states under the documented accounting of stage 2 with Adam.

    A device holds 2 bytes per parameter with ``cpu_offload``, else 4 and its share of 16. A machine holds what fp32
    initialization of one model per device takes, at least 16 bytes per parameter with offload, times
    ``additional_buffer_factor``. This is deliberately more than ``model_state_bytes`` counts: it includes fp32
    gradients at the optimizer's step. Source: the documentation's page on memory requirements.
    """
    cluster = Cluster(num_gpus_per_node, num_nodes)
    initialization = 4 * cluster.num_gpus_per_node
    if cpu_offload:
        return total_params * max(initialization, 16) * additional_buffer_factor, 2 * total_params
    gpu_bytes = 4 * total_params + 16 * total_params / cluster.total_gpus
    return total_params * initialization * additional_buffer_factor, gpu_bytes


def estimate_zero3_model_states_mem_needs(
    total_params: float,
    largest_layer_params: float,
    num_gpus_per_node: int = 1,
    num_nodes: int = 1,
    cpu_offload: bool = True,
    cpu_offload_params: bool = True,
    zero_init: bool = True,
    additional_buffer_factor: float = 1.5,
) -> tuple[float, float, float]:
    """Bytes ``(per CPU node, per GPU, of the largest layer)`` of model states under the documented accounting of
    stage 3 with Adam.

    A device holds the largest layer with its gradients (4 bytes per parameter) and its share of what is not
    offloaded: 18 bytes per parameter, 2 with ``cpu_offload`` (of the optimizer), 0 with ``cpu_offload_params`` too.
    A machine holds its share of what is offloaded and, without ``zero_init``, at least one fp32 model per device.
    Raises ValueError for parameters offloaded without their optimizer, which the documentation does not define.
    """
    cluster = Cluster(num_gpus_per_node, num_nodes)
    if cpu_offload_params and not cpu_offload:
        raise ValueError("cpu_offload_params=True needs cpu_offload=True: parameters follow their optimizer states")
    largest_layer_bytes = 4 * largest_layer_params
    offloaded = (18 if cpu_offload_params else 16) if cpu_offload else 0
    sharded = 18 if not cpu_offload else 0 if cpu_offload_params else 2
    gpu_bytes = largest_layer_bytes + sharded * total_params / cluster.total_gpus
    initialization = 4 * cluster.num_gpus_per_node
    node_share = offloaded / cluster.num_nodes
    if not zero_init:
        cpu_bytes = total_params * max(initialization, node_share)
    elif cpu_offload:
        cpu_bytes = total_params * node_share
    else:
        cpu_bytes = largest_layer_params * initialization
    return cpu_bytes * additional_buffer_factor, gpu_bytes, largest_layer_bytes
