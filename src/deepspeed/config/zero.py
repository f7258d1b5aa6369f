"""Sections ``zero_optimization`` and ``aio``."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from .section import Int, Section

OffloadDevice = Literal["none", "cpu", "nvme"]


class OffloadParamConfig(Section):
    """Where ZeRO-3 parameters lie while they are not in use."""

    device: OffloadDevice = Field("none", description="none, cpu or nvme.")
    nvme_path: str | None = Field(None, description="A directory on the NVMe device.")
    buffer_count: Int = Field(5, ge=1, description="Buffers for parameters on their way.")
    buffer_size: Int = Field(100_000_000, ge=0, description="Elements of a buffer.")
    max_in_cpu: Int = Field(1_000_000_000, ge=0, description="Parameter elements kept in CPU memory with device nvme.")
    pin_memory: bool = Field(False, description="Page-lock the CPU memory.")


class OffloadOptimizerConfig(Section):
    """Where optimizer states lie, and where the optimizer steps."""

    device: OffloadDevice = Field("none", description="none, cpu or nvme.")
    nvme_path: str | None = Field(None, description="A directory on the NVMe device.")
    buffer_count: Int = Field(4, ge=1, description="Buffers for states on their way.")
    buffer_size: Int = Field(100_000_000, ge=0, description="Elements of a buffer.")
    pin_memory: bool = Field(False, description="Page-lock the CPU memory.")
    pipeline: bool = Field(False, description="Overlap reading and writing with the step.")
    pipeline_read: bool = Field(False, description="Overlap reading with the step.")
    pipeline_write: bool = Field(False, description="Overlap writing with the step.")
    fast_init: bool = Field(False, description="Faster initialization of states on NVMe.")
    ratio: float = Field(1.0, ge=0, le=1, description="The part of the states that is offloaded.")
    cpuadam_cores_perc: float = Field(0.8, ge=0, le=1, description="The part of the cores that steps (SuperOffload).")
    super_offload: bool = Field(False, description="SuperOffload.")


class ZeroConfig(Section):
    """ZeRO: shard optimizer states (stage 1), gradients too (2), parameters too (3)."""

    stage: Literal[0, 1, 2, 3] = Field(0, description="What is sharded over the data-parallel ranks.")
    contiguous_gradients: bool = Field(
        True, description="Copy gradients into a contiguous bucket as they are produced; true is the only mode."
    )
    reduce_scatter: bool = Field(True, description="Reduce-scatter gradients; false all-reduces them.")
    reduce_bucket_size: Int = Field(
        500_000_000, ge=0, description="Most elements reduced at once. Left out, buckets of 8 million elements are used."
    )
    allgather_partitions: bool = Field(
        True, description="Gather updated parameters by all-gather; true is the only mode."
    )
    allgather_bucket_size: Int = Field(
        500_000_000, ge=0, description="Most elements gathered at once; the smaller of the two sizes counts."
    )
    overlap_comm: bool | None = Field(
        None, description="Overlap reduction with backward, and gathering with the step. On unless false."
    )
    round_robin_gradients: bool = Field(
        False, description="Spread each bucket's slices over all ranks: always so here, either value is right."
    )
    ignore_unused_parameters: bool = Field(
        True, description="Parameters may get no gradient in a step: always allowed."
    )
    load_from_fp32_weights: bool = Field(True, description="Resume from the fp32 masters: always so.")
    elastic_checkpoint: bool = Field(False, description="Load at another world size: always possible.")
    legacy_stage1: bool = Field(False, description="An old implementation of stage 1; false is the only mode.")
    offload_param: OffloadParamConfig = OffloadParamConfig()
    offload_optimizer: OffloadOptimizerConfig = OffloadOptimizerConfig()
    sub_group_size: Int = Field(1_000_000_000, ge=1, description="Stage 3: elements of one chunk of the step.")
    stage3_max_live_parameters: Int = Field(1_000_000_000, ge=0, description="Stage 3: most elements gathered at once.")
    stage3_max_reuse_distance: Int = Field(
        1_000_000_000, ge=0, description="Stage 3: keep a parameter that is used again within this many elements."
    )
    stage3_prefetch_bucket_size: Int = Field(50_000_000, ge=0, description="Stage 3: elements fetched ahead.")
    stage3_param_persistence_threshold: Int = Field(
        100_000, ge=0, description="Stage 3: parameters up to this size stay whole."
    )
    stage3_model_persistence_threshold: Int = Field(
        2**63 - 1, ge=0, description="Stage 3: most elements of parameters that stay whole."
    )
    stage3_module_granularity_threshold: Int = Field(
        0, ge=0, description="Stage 3: modules below this granularity are fetched as one."
    )
    stage3_use_all_reduce_for_fetch_params: bool = Field(False, description="Stage 3: gather by all-reduce.")
    stage3_gather_16bit_weights_on_model_save: bool = Field(
        False, description="Stage 3: gather the weights for save_16bit_model."
    )
    use_all_reduce_for_fetch_params: bool = Field(False, description="Stage 3: gather by all-reduce.")
    zero_hpz_partition_size: Int = Field(1, ge=0, description="ZeRO++: ranks of a secondary partition.")
    zero_quantized_weights: bool = Field(False, description="ZeRO++: gather quantized weights.")
    zero_quantized_nontrainable_weights: bool = Field(False, description="ZeRO++: quantize frozen weights.")
    zero_quantized_gradients: bool = Field(False, description="ZeRO++: reduce quantized gradients.")
    mics_shard_size: Int = Field(-1, description="MiCS: ranks of a sharding group; -1 for all.")
    mics_hierarchical_params_gather: bool = Field(False, description="MiCS: gather in two steps.")
    memory_efficient_linear: bool = Field(True, description="Stage 3: linear layers that save no gathered weight.")
    param_persistence_threshold: Int = Field(100_000, ge=0, description="As stage3_param_persistence_threshold.")
    log_trace_cache_warnings: bool = Field(False, description="Stage 3: log misses of the recorded order.")
    enable_sanity_checks: bool = Field(False, description="Check that ranks run the same operations.")
    zenflow: dict[str, Any] | None = Field(None, description="ZenFlow offloading.")
    leaf_module: dict[str, Any] | None = Field(None, description="Stage 3: modules fetched as one.")

    @field_validator("offload_param", "offload_optimizer", mode="before")
    @classmethod
    def _switched_off(cls, value: Any) -> Any:
        """False, None and a section whose device is null all mean: not offloaded."""
        if value is None or value is False:
            return {}
        if isinstance(value, dict):
            return {key: item for key, item in value.items() if not (key == "device" and item is None)}
        return value

    @property
    def offloads_optimizer(self) -> bool:
        """Whether optimizer states leave the device."""
        return self.offload_optimizer.device != "none"

    @property
    def offloads_parameters(self) -> bool:
        """Whether parameters leave the device."""
        return self.offload_param.device != "none"


class AioConfig(Section):
    """Asynchronous file I/O, used with device nvme."""

    block_size: Int = Field(1_048_576, ge=1, description="Bytes of one request.")
    queue_depth: Int = Field(8, ge=1, description="Requests in flight.")
    intra_op_parallelism: Int = Field(1, ge=1, description="Threads of one operation.")
    thread_count: Int = Field(1, ge=1, description="Threads of one operation (older name).")
    single_submit: bool = Field(False, description="Submit requests one by one.")
    overlap_events: bool = Field(True, description="Submit and complete at once.")
    use_gds: bool = Field(False, description="GPUDirect storage.")


