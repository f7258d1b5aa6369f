"""Sections ``data_efficiency``, ``curriculum_learning``, ``progressive_layer_drop``, ``eigenvalue``."""

from __future__ import annotations

from typing import Any

from .section import Int, Real, Section, key


class RandomLtdConfig(Section):
    """Random layerwise token dropping."""

    enabled: bool = key(False, "Drop tokens in the middle layers.")
    total_layer_num: Int | None = key(None, "Layers of the model.", unit="layers", ge=1)
    random_ltd_layer_num: Int | None = key(None, "Layers that drop tokens.", unit="layers", ge=0)
    random_ltd_layer_id: list[Int] = key([], "Indices of these layers.", unit="layers")
    model_mask_name: str | None = key(None, "Argument of a layer that is the attention mask.")
    model_type: str | None = key(None, "decoder or encoder.")
    hidden_state_order: str | None = key(None, "batch_seq_dim or seq_batch_dim.")
    layer_token_lr_schedule: dict[str, Any] = key({}, "Learning rate by tokens that layers have seen.")
    global_batch_size: Int | None = key(None, "Samples of a step.", unit="samples", ge=1)
    micro_batch_size: Int | None = key(None, "Samples of a forward.", unit="samples", ge=1)
    random_ltd_schedule: dict[str, Any] = key({}, "Tokens kept, by step: min_value, max_value, schedule_type, schedule_config.")


class DataRoutingConfig(Section):
    """Which tokens pass through which layers."""

    enabled: bool = key(False, "Route data.")
    random_ltd: RandomLtdConfig = RandomLtdConfig()


class MetricCurriculumConfig(Section):
    """Curriculum learning by metrics of samples."""

    enabled: bool = key(False, "Order samples by difficulty.")
    data_cluster_path: str | None = key(None, "Directory of samples grouped by difficulty.")
    curriculum_metrics: dict[str, Any] = key({}, "The metrics, by name, each with its schedule.")


class DataSamplingConfig(Section):
    """Which samples are drawn."""

    enabled: bool = key(False, "Sample by this section.")
    num_epochs: Int = key(1000, "Most passes over the data.", unit="epochs", ge=1)
    num_workers: Int = key(0, "Processes of the data loader.", unit="processes", ge=0)
    pin_memory: bool = key(False, "Page-lock batches.")
    curriculum_learning: MetricCurriculumConfig = MetricCurriculumConfig()
    dynamic_batching: dict[str, Any] = key({}, "Batches by number of tokens.")


class DataEfficiencyConfig(Section):
    """Sampling and routing of data."""

    enabled: bool = key(False, "Use this section.")
    seed: Int = key(1234, "Seed of sampling.", unit="seed")
    data_routing: DataRoutingConfig = DataRoutingConfig()
    data_sampling: DataSamplingConfig = DataSamplingConfig()


class CurriculumConfig(Section):
    """Curriculum learning by sequence length, the older form."""

    enabled: bool = key(False, "Grow the difficulty as training goes on.")
    curriculum_type: str = key("seqlen", "The measure of difficulty.")
    min_difficulty: Int | None = key(None, "Difficulty at the start.", unit="tokens", ge=1)
    max_difficulty: Int | None = key(None, "Difficulty at the end.", unit="tokens", ge=1)
    schedule_type: str | None = key(None, "fixed_linear, fixed_root, fixed_discrete or custom.")
    schedule_config: dict[str, Any] = key(
        {}, "total_curriculum_step, difficulty_step, root_degree, or difficulty and max_step."
    )


class ProgressiveLayerDropConfig(Section):
    """Skip layers at random, more as training goes on."""

    enabled: bool = key(False, "Skip layers.")
    theta: Real = key(1.0, "Part of the layers kept in the end.", unit="fraction", ge=0, le=1)
    gamma: Real = key(0.001, "How fast that part is reached.", unit="rate per step", ge=0)


class EigenvalueConfig(Section):
    """Largest eigenvalues of the Hessian, by block."""

    enabled: bool = key(False, "Compute them.")
    verbose: bool = key(False, "Log the iterations.")
    max_iter: Int = key(100, "Most power iterations.", unit="iterations", ge=1)
    tol: Real = key(1e-2, "Change at which the iteration ends.", unit="relative", gt=0)
    stability: Real = key(1e-6, "Added to divisors.", unit="absolute", ge=0)
    gas_boundary_resolution: Int = key(1, "How often they are computed.", unit="optimizer steps", ge=1)
    layer_name: str = key("bert.encoder.layer", "The list of blocks in the model.")
    layer_num: Int = key(0, "Number of blocks.", unit="blocks", ge=0)
