"""Sections ``autotuning``, ``elasticity`` and ``compile``."""

from __future__ import annotations

from typing import Any, Literal

from .section import Int, Real, Section, key


class AutotuningConfig(Section):
    """Search for the fastest configuration."""

    enabled: bool = key(False, "Search.")
    results_dir: str = key("autotuning_results", "Directory of results.")
    exps_dir: str = key("autotuning_exps", "Directory of experiments.")
    overwrite: bool = key(False, "Repeat experiments that have results.")
    metric: Literal["throughput", "latency", "flops", "FLOPS"] = key("throughput", "What is best.")
    start_profile_step: Int = key(3, "First step measured.", unit="optimizer steps", ge=0)
    end_profile_step: Int = key(5, "Last step measured.", unit="optimizer steps", ge=0)
    fast: bool = key(True, "Search over stages and micro-batches only.")
    max_train_batch_size: Int | None = key(None, "Largest batch.", unit="samples", ge=1)
    min_train_batch_size: Int = key(1, "Smallest batch.", unit="samples", ge=1)
    max_train_micro_batch_size_per_gpu: Int = key(1024, "Largest micro-batch.", unit="samples", ge=1)
    min_train_micro_batch_size_per_gpu: Int = key(1, "Smallest micro-batch.", unit="samples", ge=1)
    mp_size: Int = key(1, "Model-parallel ranks.", unit="ranks", ge=1)
    num_tuning_micro_batch_sizes: Int = key(3, "Micro-batches tried.", unit="experiments", ge=1)
    tuner_type: Literal["gridsearch", "random", "model_based"] = key("model_based", "Order of the search.")
    tuner_early_stopping: Int = key(5, "Experiments without a better one that end the search.", unit="experiments", ge=1)
    tuner_num_trials: Int = key(50, "Most experiments of a stage.", unit="experiments", ge=1)
    model_info: dict[str, Any] | None = key(None, "What is known of the model, such as profile and num_params.")
    model_info_path: str | None = key(None, "File of that.")
    arg_mappings: dict[str, Any] | None = key(None, "Arguments of the script by key of the configuration.")


class ElasticityConfig(Section):
    """Batch sizes that hold for many world sizes."""

    enabled: bool = key(False, "Choose batch sizes by this section.")
    max_train_batch_size: Int = key(2000, "Largest batch.", unit="samples", ge=1)
    micro_batch_sizes: list[Int] = key([2, 4, 6], "Micro-batches to choose from.", unit="samples")
    min_gpus: Int = key(1, "Fewest ranks.", unit="ranks", ge=1)
    max_gpus: Int = key(10_000, "Most ranks.", unit="ranks", ge=1)
    min_time: Int = key(0, "Time between two changes.", unit="minutes", ge=0)
    prefer_larger_batch: bool = key(True, "Among equal choices take the larger batch.")
    ignore_non_elastic_batch_info: bool = key(False, "Do not complain of other batch keys.")
    version: Real = key(0.2, "Version of the rules.", unit="version", gt=0)
    model_parallel_size: Int = key(1, "Model-parallel ranks.", unit="ranks", ge=1)
    num_gpus_per_node: Int = key(1, "Ranks of a host.", unit="ranks", ge=1)


DEEPCOMPILE = (
    "passes",
    "free_activation",
    "offload_activation",
    "offload_activation_pin_memory",
    "offload_opt_states",
    "offload_parameters",
    "double_buffer",
    "symmetric_memory",
    "debug_log",
    "sync_before_reduce",
    "sync_after_reduce",
    "sync_before_allgather",
    "sync_after_allgather",
    "keep_int_input_tensors",
    "keep_all_input_tensors",
)
"""Keys of ``compile`` that DeepCompile alone reads."""


class CompileConfig(Section):
    """Compile the model by ``torch.compile`` when the engine is made. The keys after deepcompile are DeepCompile's."""

    enabled: bool = key(False, "Compile the model.")
    backend: str = key("inductor", "The backend of torch.compile.")
    kwargs: dict[str, Any] = key({}, "Further keyword arguments of torch.compile.")
    deepcompile: bool = key(False, "DeepCompile.")
    passes: list[str] = key([], "DeepCompile's passes: autosp, autotp.")
    free_activation: bool = key(False, "Free activations early.")
    offload_activation: bool = key(False, "Keep activations in CPU memory.")
    offload_activation_pin_memory: bool = key(True, "Page-lock that memory.")
    offload_opt_states: bool = key(False, "Keep optimizer states in CPU memory.")
    offload_parameters: bool = key(False, "Keep parameters in CPU memory.")
    double_buffer: bool = key(True, "Gather into two buffers in turn.")
    symmetric_memory: bool = key(False, "Use symmetric memory.")
    debug_log: bool = key(False, "Log the passes.")
    sync_before_reduce: bool = key(False, "Synchronize the device before reductions.")
    sync_after_reduce: bool = key(False, "Synchronize the device after reductions.")
    sync_before_allgather: bool = key(False, "Synchronize the device before gathering.")
    sync_after_allgather: bool = key(False, "Synchronize the device after gathering.")
    keep_int_input_tensors: bool = key(True, "Keep integer inputs of the graph.")
    keep_all_input_tensors: bool = key(False, "Keep all inputs of the graph.")
