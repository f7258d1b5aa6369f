"""Section ``zero_optimization``."""

from __future__ import annotations

from typing import Literal

from .errors import Problem
from .offload import UNLIMITED, OffloadOptimizerConfig, OffloadParamConfig
from .section import Int, Most, Real, Section, key


class ZenFlowConfig(Section):
    """ZenFlow: offloading that updates the most important gradients on the device."""

    topk_ratio: Real = key(0.1, "The part of the gradients that is updated on the device.", unit="fraction", gt=0, le=1)
    select_strategy: Literal["auto", "step", "epoch"] = key("auto", "When important gradients are chosen anew.")
    select_interval: Int | Literal["auto"] = key("auto", "How often they are chosen.", unit="steps or epochs")
    update_interval: Int | Literal["auto"] = key("auto", "How often the rest is updated.", unit="steps")
    full_warm_up_rounds: Int = key(0, "Steps that update all gradients first.", unit="steps", ge=0)
    overlap_step: bool = key(False, "Overlap the step on CPU with computing.")
    offload: bool = key(False, "Offload the chosen gradients too.")
    auto_ratio: Real = key(0.99, "Importance that an automatic interval keeps.", unit="fraction", gt=0, le=1)
    steps_per_epoch: Int | None = key(None, "Steps of one epoch, for the strategy epoch.", unit="steps", ge=1)
    pt_reserved_cores_perc: Real = key(0.5, "The part of the cores kept for PyTorch.", unit="fraction", ge=0, le=1)


class LeafModuleConfig(Section):
    """Modules whose parameters are fetched at once, with those of all modules inside."""

    classes: list[str] = key([], "Names of classes, with or without their module.")
    names: list[str] = key([], "Names of modules in the model.")
    name_suffixes: list[str] = key([], "Endings of names of modules in the model.")


class ZeroConfig(Section):
    """ZeRO: shard optimizer states (stage 1), gradients too (2), parameters too (3)."""

    stage: Int = key(0, "What is sharded over the data-parallel ranks: 0, 1, 2 or 3.", ge=0, le=3)
    contiguous_gradients: bool = key(True, "Copy gradients into a contiguous bucket as they are produced.")
    reduce_scatter: bool = key(True, "Reduce-scatter gradients; false all-reduces them.")
    reduce_bucket_size: Int = key(
        2**22, "Most parameters reduced at once; small, reduction overlaps backward better.", unit="elements", ge=0
    )
    allgather_partitions: bool = key(True, "Gather updated parameters by all-gather.")
    allgather_bucket_size: Int | None = key(
        None,
        "Most parameters gathered at once. The smaller of this and reduce_bucket_size holds for both; left out, the other "
        "one does.",
        unit="elements",
        ge=0,
    )
    overlap_comm: bool = key(True, "Overlap reduction with backward, and gathering with the step.")
    round_robin_gradients: bool = key(
        False, "Spread each bucket's slices over all ranks: always so here, either value is right."
    )
    parameter_alignment: bool = key(
        False, "Start every parameter in its bucket at a 64-byte address: always so here, either value is right."
    )
    ignore_unused_parameters: bool = key(True, "Parameters may get no gradient in a step.")
    compute_grad_norm: bool = key(True, "Compute the global gradient norm at every step.")
    load_from_fp32_weights: bool = key(True, "Resume from the fp32 masters of a checkpoint.")
    elastic_checkpoint: bool = key(
        False, "Load checkpoints at another world size: always possible here, either value is right."
    )
    legacy_stage1: bool = key(False, "An old implementation of stage 1.")
    offload_param: OffloadParamConfig = OffloadParamConfig()
    offload_optimizer: OffloadOptimizerConfig = OffloadOptimizerConfig()
    sub_group_size: Int = key(1_000_000_000, "Parameters of one chunk of the step.", unit="elements", ge=0, stage=3)
    stage3_max_live_parameters: Int = key(1_000_000_000, "Most parameters gathered at once.", unit="elements", ge=0, stage=3)
    stage3_max_reuse_distance: Int = key(
        0,
        "Keep parameters that are used again before this many others are; 0 keeps only what is used again at once.",
        unit="elements",
        ge=0,
        stage=3,
    )
    stage3_prefetch_bucket_size: Most = key(50_000_000, "Parameters fetched ahead.", unit="elements", ge=0, stage=3)
    stage3_param_persistence_threshold: Int = key(
        100_000, "Parameters up to this size stay whole.", unit="elements", ge=0, stage=3
    )
    stage3_model_persistence_threshold: Int = key(UNLIMITED, "Most parameters that stay whole.", unit="elements", ge=0, stage=3)
    stage3_module_granularity_threshold: Int = key(
        0, "A module of fewer parameters per module in it is fetched as one, with all inside.", unit="elements", ge=0, stage=3
    )
    stage3_use_all_reduce_for_fetch_params: bool = key(False, "Gather by all-reduce.", stage=3)
    stage3_gather_16bit_weights_on_model_save: bool = key(False, "Gather the weights for save_16bit_model.", stage=3)
    memory_efficient_linear: bool = key(
        True, "Linear layers that keep no gathered weight: always so here, either value is right.", stage=3
    )
    log_trace_cache_warnings: bool = key(False, "Warn where another unit is needed than was expected.", stage=3)
    leaf_module: LeafModuleConfig = LeafModuleConfig()
    zero_hpz_partition_size: Int = key(
        1,
        "ZeRO++: ranks, consecutive ones as on one machine, that hold a second copy of the parameters in shards: what was "
        "gathered once from all is gathered again, for backward, from these. 0 or 1 for none.",
        unit="ranks",
        ge=0,
        stage=3,
    )
    zero_quantized_weights: bool = key(False, "ZeRO++: gather quantized weights.")
    zero_quantized_nontrainable_weights: bool = key(False, "ZeRO++: quantize frozen weights.")
    zero_quantized_gradients: bool = key(False, "ZeRO++: reduce quantized gradients.")
    mics_shard_size: Int = key(
        -1,
        "MiCS: ranks that hold one copy of the sharded states, consecutive ones; each such group has a copy. -1 for all ranks.",
        unit="ranks",
    )
    mics_hierarchical_params_gather: bool = key(False, "MiCS: gather in two steps.")
    enable_sanity_checks: bool = key(
        False,
        "Compare what the ranks are about to do before each collective, and name the first difference. Operations then begin "
        "when they are waited for: nothing overlaps.",
    )
    save_muon_momentum_buffer_in_memory: bool = key(False, "With device nvme, keep Muon's momentum in memory.")
    zenflow: ZenFlowConfig | None = key(None, "ZenFlow offloading.")

    def sharding_problems(self, world_size: int) -> list[Problem]:
        """What is wrong with the sizes of sharding groups for ``world_size`` data-parallel ranks."""
        name, size = "zero_optimization.mics_shard_size", self.mics_shard_size
        if size != -1 and size < 1:
            return [Problem(name, f"found {size}, expected -1 or a number of ranks.")]
        if size != -1 and self.stage < 1:
            return [Problem(name, "needs stage 1, 2 or 3: stage 0 shards nothing.")]
        problems = _uneven(name, size, world_size, "data-parallel ranks") if size != -1 else []
        name, nearby = "zero_optimization.zero_hpz_partition_size", self.zero_hpz_partition_size
        if nearby > 1 and self.stage < 3:
            return [*problems, Problem(name, f"needs stage 3; found stage {self.stage}.")]
        if nearby > 1 and not problems:
            whole = (world_size, "data-parallel ranks") if size == -1 else (size, "ranks of mics_shard_size")
            problems += _uneven(name, nearby, *whole)
        return problems

    @property
    def offloads_optimizer(self) -> bool:
        """Whether optimizer states leave the device."""
        return self.offload_optimizer.device != "none"

    @property
    def offloads_parameters(self) -> bool:
        """Whether parameters leave the device."""
        return self.offload_param.device != "none"

    @property
    def bucket_numel(self) -> int:
        """Elements of a bucket: the smaller of the two bucket sizes."""
        if self.allgather_bucket_size is None:
            return self.reduce_bucket_size
        return min(self.reduce_bucket_size, self.allgather_bucket_size)


def _uneven(name: str, size: int, ranks: int, what: str) -> list[Problem]:
    """The problem with a group size that does not divide the number of ranks, which are ``what``."""
    if ranks % size == 0:
        return []
    divisors = ", ".join(str(n) for n in range(1, ranks + 1) if ranks % n == 0)
    found = f"{size} x {ranks // size} = {size * (ranks // size)}" if size < ranks else f"{size} > {ranks}"
    return [Problem(name, f"found {size}, which does not divide {ranks} {what} ({found}); set it to {divisors}.")]
