"""Keys of features that are not built yet: switched on, each is an error that says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from .errors import Problem

if TYPE_CHECKING:
    from .root import DeepSpeedConfig

Predicate = Callable[["DeepSpeedConfig"], bool]

OPTIMIZERS = ("Adam", "AdamW", "SGD", "Adagrad", "Lion", "LAMB", "Muon")
SCHEDULERS = ("LRRangeTest", "OneCycle", "WarmupLR", "WarmupDecayLR", "WarmupCosineLR")

UNBUILT: tuple[tuple[str, Predicate, str], ...] = (
    ("zero_optimization.stage", lambda c: c.zero_optimization.stage == 3, "stage 3 is not built yet; use stage 2."),
    (
        "zero_optimization.offload_optimizer.device",
        lambda c: c.zero_optimization.offloads_optimizer,
        "offloading is not built yet; use none.",
    ),
    (
        "zero_optimization.offload_param.device",
        lambda c: c.zero_optimization.offloads_parameters,
        "offloading is not built yet; use none.",
    ),
    (
        "zero_optimization",
        lambda c: c.zero_optimization.zero_quantized_weights or c.zero_optimization.zero_quantized_gradients,
        "quantized communication (ZeRO++) is not built yet; switch it off.",
    ),
    (
        "zero_optimization.zero_hpz_partition_size",
        lambda c: c.zero_optimization.zero_hpz_partition_size > 1,
        "secondary partitions (ZeRO++) are not built yet; use 1.",
    ),
    (
        "zero_optimization.mics_shard_size",
        lambda c: c.zero_optimization.mics_shard_size > 0,
        "MiCS is not built yet; use -1.",
    ),
    ("zero_optimization.zenflow", lambda c: bool(c.zero_optimization.zenflow), "ZenFlow is not built yet; remove it."),
    (
        "zero_optimization.contiguous_gradients",
        lambda c: not c.zero_optimization.contiguous_gradients,
        "gradients are always contiguous; remove the key.",
    ),
    (
        "zero_optimization.allgather_partitions",
        lambda c: not c.zero_optimization.allgather_partitions,
        "parameters are always gathered by all-gather; remove the key.",
    ),
    (
        "fp16.fp16_master_weights_and_grads",
        lambda c: c.fp16.fp16_master_weights_and_grads,
        "fp16 masters are not built yet; masters are fp32.",
    ),
    (
        "bf16",
        lambda c: c.bf16.bf16_master_weights_and_grads or c.bf16.bf16_optimizer_states,
        "bf16 masters and states are not built yet; they are fp32.",
    ),
    ("amp.enabled", lambda c: c.amp.enabled, "Apex is not supported; use bf16, fp16 or torch_autocast."),
    (
        "torch_autocast.lower_precision_safe_modules",
        lambda c: c.torch_autocast.lower_precision_safe_modules is not None,
        "choosing modules is not built yet; remove the key.",
    ),
    (
        "gradient_allreduce_op",
        lambda c: c.gradient_allreduce_op != "avg",
        "summed gradients are not built yet; use avg.",
    ),
    (
        "sparse_gradients",
        lambda c: c.sparse_gradients,
        "sparse communication is not built yet; leave it out: sparse gradients are reduced densely.",
    ),
    (
        "tensor_parallel.autotp_size",
        lambda c: c.tensor_parallel.autotp_size > 1,
        "tensor parallelism is not built yet; use 1.",
    ),
    (
        "activation_checkpointing",
        lambda c: any(value not in (False, None) for value in c.activation_checkpointing.model_dump().values()),
        "its switches are not built yet; use torch.utils.checkpoint in the model.",
    ),
    (
        "compression_training",
        lambda c: bool(c.compression_training),
        "compression is not built yet; remove the section.",
    ),
    ("compile.deepcompile", lambda c: c.compile.deepcompile, "DeepCompile is not built yet; set it to false."),
    (
        "compile",
        lambda c: c.compile.enabled and bool(c.compile.model_extra),
        "only enabled, backend and kwargs have an effect; remove the other keys.",
    ),
    (
        "flops_profiler.recompute_fwd_factor",
        lambda c: c.flops_profiler.recompute_fwd_factor != 0,
        "only forward passes are measured, and what is recomputed in backward is not; leave it at 0.",
    ),
    ("comms_logger.debug", lambda c: c.comms_logger.debug, "callers are not recorded; set it to false."),
    ("datastates_ckpt", lambda c: bool(c.datastates_ckpt), "it is not built yet; remove the section."),
)

SWITCHES = (
    "hybrid_engine",
    "autotuning",
    "sparse_attention",
    "data_efficiency",
    "curriculum_learning",
    "progressive_layer_drop",
    "eigenvalue",
    "elasticity",
    "expert_parallel",
    "pipeline",
    "nebula",
)
"""Sections of features that are not built yet, each with a key ``enabled``."""


def unbuilt_problems(config: DeepSpeedConfig) -> list[Problem]:
    """A problem for each feature that ``config`` switches on and that is not built yet."""
    found = [Problem(key, sentence) for key, applies, sentence in UNBUILT if applies(config)]
    for section in SWITCHES:
        if getattr(config, section).enabled:
            found.append(Problem(f"{section}.enabled", "this feature is not built yet; set it to false."))
    if config.optimizer is not None and config.optimizer.type.lower() not in map(str.lower, OPTIMIZERS):
        found.append(
            Problem("optimizer.type", f"found '{config.optimizer.type}'; the optimizers are {', '.join(OPTIMIZERS)}.")
        )
    if config.scheduler is not None and config.scheduler.type not in (None, *SCHEDULERS):
        found.append(
            Problem("scheduler.type", f"found '{config.scheduler.type}'; the schedules are {', '.join(SCHEDULERS)}.")
        )
    return found
