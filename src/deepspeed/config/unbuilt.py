"""Keys of features that are not built yet, and values that ask for what is never done: each is an error that says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from .errors import Problem
from .parallel import PipelineConfig
from .tuning import DEEPCOMPILE, CompileConfig

if TYPE_CHECKING:
    from .root import RootSection

Predicate = Callable[["RootSection"], bool]

OPTIMIZERS = ("onebitadam", "onebitlamb", "zerooneadam", "muadam", "muadamw", "musgd")
"""Documented optimizers that are not built yet, in lower case. All others are known to the room that builds them."""

UNBUILT: tuple[tuple[str, Predicate, str], ...] = (
    (
        "zero_optimization.zero_quantized_weights",
        lambda c: c.zero_optimization.zero_quantized_weights or c.zero_optimization.zero_quantized_nontrainable_weights,
        "quantized communication (ZeRO++) is not built yet; switch it off.",
    ),
    (
        "zero_optimization.zero_quantized_gradients",
        lambda c: c.zero_optimization.zero_quantized_gradients,
        "quantized communication (ZeRO++) is not built yet; switch it off.",
    ),
    (
        "zero_optimization.mics_hierarchical_params_gather",
        lambda c: c.zero_optimization.mics_hierarchical_params_gather,
        "gathering in two steps is not built yet; set it to false.",
    ),
    (
        "zero_optimization.offload_optimizer.super_offload",
        lambda c: c.zero_optimization.offload_optimizer.super_offload,
        "SuperOffload is not built yet; set it to false.",
    ),
    (
        "zero_optimization.zenflow",
        lambda c: c.zero_optimization.zenflow is not None,
        "ZenFlow is not built yet; remove it.",
    ),
    (
        "zero_optimization.ignore_unused_parameters",
        lambda c: not c.zero_optimization.ignore_unused_parameters,
        "ending at unused parameters is not built yet; remove the key.",
    ),
    (
        "zero_optimization.load_from_fp32_weights",
        lambda c: not c.zero_optimization.load_from_fp32_weights,
        "resuming from 16-bit weights is not built yet; remove the key.",
    ),
    (
        "zero_optimization.save_muon_momentum_buffer_in_memory",
        lambda c: c.zero_optimization.save_muon_momentum_buffer_in_memory,
        "offloading is not built yet; remove the key.",
    ),
    (
        "aio.use_gds",
        lambda c: c.aio.use_gds,
        "GPUDirect storage is not built yet; set it to false: data goes through CPU memory.",
    ),
    (
        "fp16.fp16_master_weights_and_grads",
        lambda c: c.fp16.fp16_master_weights_and_grads,
        "fp16 masters are not built yet; masters are fp32.",
    ),
    (
        "bf16.bf16_master_weights_and_grads",
        lambda c: c.bf16.bf16_master_weights_and_grads,
        "bf16 masters are not built yet; they are fp32.",
    ),
    (
        "bf16.bf16_optimizer_states",
        lambda c: c.bf16.bf16_optimizer_states,
        "bf16 states are not built yet; they are fp32.",
    ),
    (
        "torch_autocast.lower_precision_safe_modules",
        lambda c: c.torch_autocast.lower_precision_safe_modules is not None,
        "choosing modules is not built yet; remove the key.",
    ),
    (
        "sparse_gradients",
        lambda c: c.sparse_gradients,
        "sparse communication is not built yet; leave it out: sparse gradients are reduced densely.",
    ),
    (
        "seq_parallel_communication_data_type",
        lambda c: c.seq_parallel_communication_data_type != "fp32",
        "sequence parallelism is not built yet; remove the key.",
    ),
    (
        "managed_gradient_accumulation",
        lambda c: not c.managed_gradient_accumulation,
        "false is not built yet; use engine.set_gradient_accumulation_boundary to say where a step ends.",
    ),
    ("disable_python_gc", lambda c: c.disable_python_gc, "it is not built yet; call gc.disable() in the script."),
    (
        "use_data_before_expert_parallelism",
        lambda c: c.use_data_before_expert_parallelism,
        "experts are not built yet; remove the key.",
    ),
    (
        "checkpoint.use_node_local_storage",
        lambda c: c.checkpoint.use_node_local_storage,
        "it is not built yet; save to a directory that all hosts share, and set it to false.",
    ),
    (
        "tensor_parallel.autotp_size",
        lambda c: c.tensor_parallel.autotp_size > 1,
        "tensor parallelism is not built yet; use 1.",
    ),
    ("pipeline", lambda c: c.pipeline != PipelineConfig(), "pipeline parallelism is not built yet; remove the section."),
    (
        "sparse_attention.mode",
        lambda c: c.sparse_attention.mode != "dense",
        "sparse attention is not built yet; remove the section.",
    ),
    (
        "compression_training",
        lambda c: c.compression_training.enabled,
        "compression is not built yet; set enabled to false in each of its techniques, or remove the section.",
    ),
    ("compile.deepcompile", lambda c: c.compile.deepcompile, "DeepCompile is not built yet; set it to false."),
    (
        "compile",
        lambda c: any(getattr(c.compile, name) != CompileConfig.model_fields[name].default for name in DEEPCOMPILE),
        "only enabled, backend and kwargs have an effect, DeepCompile is not built yet; remove its keys.",
    ),
    (
        "flops_profiler.recompute_fwd_factor",
        lambda c: c.flops_profiler.recompute_fwd_factor != 0,
        "only forward passes are measured, and what is recomputed in backward is not; leave it at 0.",
    ),
    ("comms_logger.debug", lambda c: c.comms_logger.debug, "callers are not recorded; set it to false."),
    (
        "datastates_ckpt",
        lambda c: c.datastates_ckpt is not None and c.datastates_ckpt.enabled,
        "it is not built yet; remove the section.",
    ),
)

SWITCHES = (
    "hybrid_engine",
    "autotuning",
    "data_efficiency",
    "curriculum_learning",
    "progressive_layer_drop",
    "eigenvalue",
    "elasticity",
    "expert_parallel",
    "nebula",
)
"""Sections of features that are not built yet, each with a key ``enabled``."""

ONLY: tuple[tuple[str, Predicate, str], ...] = (
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
        "zero_optimization.stage3_use_all_reduce_for_fetch_params",
        lambda c: c.zero_optimization.stage3_use_all_reduce_for_fetch_params,
        "parameters are always gathered by all-gather; remove the key.",
    ),
    (
        "zero_optimization.compute_grad_norm",
        lambda c: not c.zero_optimization.compute_grad_norm,
        "the norm comes with the check for non-finite gradients; remove the key.",
    ),
    (
        "zero_optimization.legacy_stage1",
        lambda c: c.zero_optimization.legacy_stage1,
        "there is one implementation of stage 1; remove the key.",
    ),
    (
        "bf16.immediate_grad_update",
        lambda c: not c.bf16.immediate_grad_update,
        "gradients always enter their bucket as they are computed; remove the key.",
    ),
    (
        "bf16.check_grad_overflow",
        lambda c: not c.bf16.check_grad_overflow,
        "a step with a non-finite gradient is always skipped; remove the key.",
    ),
    (
        "disable_allgather",
        lambda c: c.disable_allgather,
        "updated parameters are always gathered by all-gather; remove the key.",
    ),
    (
        "optimizer.legacy_fusion",
        lambda c: c.optimizer is not None and c.optimizer.legacy_fusion,
        "there is one implementation of each optimizer; remove the key.",
    ),
    ("amp.enabled", lambda c: c.amp.enabled, "Apex is not supported; use bf16, fp16 or torch_autocast."),
)
"""Values that ask for something that is never done here."""


def unbuilt_problems(config: RootSection) -> list[Problem]:
    """A problem for each feature that ``config`` switches on and that is not built, and for each value that has no
    effect."""
    found = [Problem(key, sentence) for key, applies, sentence in UNBUILT + ONLY if applies(config)]
    for section in SWITCHES:
        if getattr(config, section).enabled:
            found.append(Problem(f"{section}.enabled", "this feature is not built yet; set it to false."))
    if config.optimizer is not None and config.optimizer.type.lower() in OPTIMIZERS:
        found.append(Problem("optimizer.type", f"{config.optimizer.type} is not built yet; use Adam, AdamW or Lamb."))
    return found
