from __future__ import annotations

from typing import Any

import pytest

from deepspeed.config import ConfigError, load_config
from deepspeed.config.unbuilt import ONLY, SWITCHES, UNBUILT

SWITCHED_ON: dict[str, dict[str, Any]] = {
    "zero_optimization.stage3_use_all_reduce_for_fetch_params": {
        "zero_optimization": {"stage": 3, "stage3_use_all_reduce_for_fetch_params": True}
    },
    "zero_optimization.offload_optimizer.super_offload": {
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "super_offload": True}}
    },
    "zero_optimization.zero_quantized_weights": {"zero_optimization": {"zero_quantized_nontrainable_weights": True}},
    "zero_optimization.zero_quantized_gradients": {"zero_optimization": {"zero_quantized_gradients": True}},
    "zero_optimization.mics_hierarchical_params_gather": {"zero_optimization": {"mics_hierarchical_params_gather": True}},
    "zero_optimization.zenflow": {"zero_optimization": {"zenflow": {}}},
    "zero_optimization.ignore_unused_parameters": {"zero_optimization": {"ignore_unused_parameters": False}},
    "zero_optimization.load_from_fp32_weights": {"zero_optimization": {"load_from_fp32_weights": False}},
    "zero_optimization.save_muon_momentum_buffer_in_memory": {
        "zero_optimization": {"save_muon_momentum_buffer_in_memory": True}
    },
    "aio.use_gds": {"aio": {"use_gds": True}},
    "fp16.fp16_master_weights_and_grads": {"fp16": {"fp16_master_weights_and_grads": True}},
    "bf16.bf16_master_weights_and_grads": {"bf16": {"bf16_master_weights_and_grads": True}},
    "bf16.bf16_optimizer_states": {"bf16": {"bf16_optimizer_states": True}},
    "torch_autocast.lower_precision_safe_modules": {"torch_autocast": {"lower_precision_safe_modules": ["torch.nn.Linear"]}},
    "sparse_gradients": {"sparse_gradients": True},
    "seq_parallel_communication_data_type": {"seq_parallel_communication_data_type": "bf16"},
    "managed_gradient_accumulation": {"managed_gradient_accumulation": False},
    "disable_python_gc": {"disable_python_gc": True},
    "use_data_before_expert_parallelism": {"use_data_before_expert_parallelism": True},
    "checkpoint.use_node_local_storage": {"checkpoint": {"use_node_local_storage": True}},
    "tensor_parallel.autotp_size": {"tensor_parallel": {"autotp_size": 2}},
    "pipeline": {"pipeline": {"stages": 2}},
    "sparse_attention.mode": {"sparse_attention": {"mode": "fixed"}},
    "compression_training": {"compression_training": {"head_pruning": {"shared_parameters": {"enabled": True}}}},
    "compile.deepcompile": {"compile": {"deepcompile": True}},
    "compile": {"compile": {"enabled": True, "passes": ["autosp"]}},
    "flops_profiler.recompute_fwd_factor": {"flops_profiler": {"recompute_fwd_factor": 1.0}},
    "comms_logger.debug": {"comms_logger": {"debug": True}},
    "datastates_ckpt": {"datastates_ckpt": {"host_cache_size": 16}},
    "zero_optimization.contiguous_gradients": {"zero_optimization": {"contiguous_gradients": False}},
    "zero_optimization.allgather_partitions": {"zero_optimization": {"allgather_partitions": False}},
    "zero_optimization.compute_grad_norm": {"zero_optimization": {"compute_grad_norm": False}},
    "zero_optimization.legacy_stage1": {"zero_optimization": {"legacy_stage1": True}},
    "bf16.immediate_grad_update": {"bf16": {"immediate_grad_update": False}},
    "bf16.check_grad_overflow": {"bf16": {"check_grad_overflow": False}},
    "disable_allgather": {"disable_allgather": True},
    "optimizer.legacy_fusion": {"optimizer": {"type": "Adam", "legacy_fusion": True}},
    "amp.enabled": {"amp": {"enabled": True, "opt_level": "O1"}},
}
"""For each key in the tables, a configuration that asks for it."""


@pytest.mark.parametrize(("path", "sentence"), [(path, sentence) for path, _, sentence in UNBUILT + ONLY])
def test_what_is_not_built_is_an_error_that_says_so_and_what_to_do(path, sentence):
    with pytest.raises(ConfigError) as caught:
        load_config(SWITCHED_ON[path])
    assert f"{path}: {sentence}" in str(caught.value)


@pytest.mark.parametrize("section", SWITCHES)
def test_a_section_of_a_feature_that_is_not_built_may_be_off_but_not_on(section):
    for off in ({"enabled": False}, {"enabled": "auto"}, {}, "auto", None):
        load_config({section: off})
    with pytest.raises(ConfigError, match=f"{section}.enabled: this feature is not built yet; set it to false"):
        load_config({section: {"enabled": True}})


@pytest.mark.parametrize("kind", ["OneBitAdam", "OnebitLamb", "ZeroOneAdam"])
def test_an_optimizer_that_is_not_built_is_called_that(kind):
    with pytest.raises(ConfigError, match=f"optimizer.type: {kind} is not built yet"):
        load_config({"optimizer": {"type": kind}})


@pytest.mark.parametrize(
    "config",
    [
        {"tensor_parallel": {"autotp_size": 1}},
        {"pipeline": {"stages": "auto", "partition": "best", "seed_layers": False}},
        {"sparse_attention": {"mode": "dense", "block": 16}},
        {"compression_training": {"weight_quantization": {"shared_parameters": {"enabled": False}}}},
        {"datastates_ckpt": {"enabled": False}},
        {"amp": {"enabled": False, "opt_level": "O1"}},
        {"zero_optimization": {"zero_hpz_partition_size": 1, "mics_shard_size": -1}},
        {"elasticity": {"enabled": False, "max_train_batch_size": 2000, "micro_batch_sizes": [2, 4, 6]}},
        {"hybrid_engine": {"enabled": False, "max_out_tokens": 512, "inference_tp_size": 1}},
        {"curriculum_learning": {"enabled": False, "schedule_config": {"difficulty_step": 8}}},
        {"expert_parallel": {"enabled": False, "score_func": "auto", "top_k": 2}},
    ],
)
def test_a_section_that_is_written_out_but_off_is_fine(config):
    load_config(config)


@pytest.mark.parametrize("section", ["elasticity", "hybrid_engine", "data_efficiency", "expert_parallel", "nebula"])
def test_keys_of_a_feature_that_is_not_built_are_checked_too(section):
    with pytest.raises(ConfigError, match=f"{section}.enabel: unknown key; did you mean 'enabled'"):
        load_config({section: {"enabel": False}})
