"""Sections ``tensor_parallel``, ``expert_parallel``, ``pipeline`` and ``hybrid_engine``."""

from __future__ import annotations

from typing import Any, Literal

from .section import Int, Real, Section, key


class LayerSpec(Section):
    """Tensor parallelism: how the parameters that match are split."""

    patterns: list[str] = key([], "Regular expressions of parameter names.")
    partition_type: Literal["row", "column", "skip"] = key("column", "How they are split.")
    shape: list[Any] | None = key(None, "Their shape before splitting, for fused weights.")
    partition_dim: Int | None = key(None, "The dimension of that shape that is split.", unit="dimension")
    model_types: list[str] | None = key(None, "Model types that this rule is for.")


class PartitionConfig(Section):
    """Tensor parallelism: rules of splitting."""

    use_default_specs: bool = key(True, "Add the rules to those of preset_model.")
    layer_specs: list[LayerSpec] = key([], "The rules, in order.")


class TensorParallelConfig(Section):
    """Tensor parallelism. On with autotp_size above 1."""

    autotp_size: Int = key(0, "Ranks over which layers are split; 0 or 1 for none.", unit="ranks", ge=0)
    preset_model: str | None = key(None, "A model whose layers are known: llama, bloom, mixtral, qwen2, ...")
    tp_overlap_comm: bool = key(False, "Overlap reductions with computing.")
    vocab_parallel_lm_head: bool = key(False, "Keep the output vocabulary split, with a loss that knows it.")
    partition_config: PartitionConfig | None = key(None, "Rules of splitting.")


class ExpertParallelConfig(Section):
    """Expert parallelism of mixture-of-experts models."""

    enabled: bool = key(False, "Find mixture-of-experts layers and spread their experts over ranks.")
    autoep_size: Int = key(1, "Ranks over which experts are spread.", unit="ranks", ge=1)
    expert_tensor_parallel_size: Int = key(1, "Ranks over which an expert is split.", unit="ranks", ge=1)
    async_split_plan: bool = key(False, "Overlap the exchange of token counts with sorting tokens.")
    comm_backend: str | None = key(None, "What exchanges tokens.")
    preset_model: str | None = key(None, "A model whose layers are known: mixtral, qwen3_moe, deepseek_v2, ...")
    use_grouped_mm: bool = key(True, "Compute all experts by one grouped matrix product.")
    disable_triton_grouped_mm: bool = key(False, "Do not use Triton for it.")
    moe_layer_pattern: str | None = key(None, "Regular expression of the names of the layers.")
    router_pattern: str | None = key(None, "Attribute that is the router.")
    expert_pattern: str | None = key(None, "Attribute that holds the experts.")
    score_func: Literal["auto", "softmax", "sigmoid"] = key("auto", "Scores of the router.")
    score_apply: Literal["auto", "pre", "post"] = key("auto", "Whether scores apply before or after the experts.")
    combine_impl: str = key("auto", "How outputs of experts are combined.")
    route_norm: bool | None = key(None, "Normalize the scores of the chosen experts.")
    route_scale: Real = key(1.0, "Factor of the scores.", unit="factor")
    top_k: Int | Literal["auto"] = key("auto", "Experts of a token.", unit="experts")
    routed_scaling_factor: Real | Literal["auto"] = key("auto", "Factor of the outputs of experts.", unit="factor")
    num_expert_groups: Int | None = key(None, "Groups of experts.", unit="groups", ge=1)
    num_limited_groups: Int | None = key(None, "Groups from which a token's experts come.", unit="groups", ge=1)
    load_balance_coeff: Real | None = key(None, "Coefficient of balancing without a loss.", unit="factor")
    expert_w1: str | None = key(None, "Name of the gate's weight.")
    expert_w2: str | None = key(None, "Name of the down projection's weight.")
    expert_w3: str | None = key(None, "Name of the up projection's weight.")
    num_experts_attr: str | None = key(None, "Attribute of the model's config with the number of experts.")
    top_k_attr: str | None = key(None, "Attribute of the model's config with the experts of a token.")
    has_shared_experts: bool | None = key(None, "Whether every token also goes to shared experts.")
    shared_experts_pattern: str | None = key(None, "Attribute that holds the shared experts.")


class PipelineConfig(Section):
    """Pipeline parallelism of a PipelineModule."""

    stages: Int | Literal["auto"] = key("auto", "Stages of the pipeline.", unit="stages")
    partition: str = key("best", "How layers are divided among stages.")
    seed_layers: bool = key(False, "Seed each layer's initialization by its index.")
    activation_checkpoint_interval: Int = key(0, "Layers between two checkpoints; 0 for none.", unit="layers", ge=0)
    pipe_partitioned: bool = key(True, "Split activations over tensor-parallel ranks on their way.")
    grad_partitioned: bool = key(True, "Split their gradients too.")
    use_reentrant: bool = key(True, "Use re-entrant activation checkpointing.")


class HybridEngineConfig(Section):
    """Training and generation with one engine."""

    enabled: bool = key(False, "Generate with inference kernels between training steps.")
    max_out_tokens: Int = key(512, "Most tokens of a generation, prompt included.", unit="tokens", ge=1)
    inference_tp_size: Int = key(1, "Ranks over which layers are split while generating.", unit="ranks", ge=1)
    release_inference_cache: bool = key(False, "Free the cache after each generation.")
    pin_parameters: bool = key(True, "Page-lock parameters.")
    tp_gather_partition_size: Int = key(8, "Layers gathered at once.", unit="layers", ge=1)
    enable_cuda_graph: bool = key(False, "Replay the generation of a token as a CUDA graph.")
