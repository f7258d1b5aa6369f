"""The whole configuration: top-level keys and sections."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, PrivateAttr

from .features import (
    ActivationCheckpointingConfig,
    CheckpointConfig,
    CompileConfig,
    DataSection,
    FeatureSection,
    HybridEngineConfig,
    PipelineConfig,
    TensorParallelConfig,
)
from .monitoring import (
    CometConfig,
    CommsLoggerConfig,
    CsvConfig,
    FlopsProfilerConfig,
    TensorBoardConfig,
    ThroughputTimersConfig,
    WandbConfig,
)
from .optimization import OptimizerConfig, SchedulerConfig
from .precision import AmpConfig, Bf16Config, DataTypesConfig, DtypeName, Fp16Config, TorchAutocastConfig
from .section import Int, Section
from .zero import AioConfig, ZeroConfig


class DeepSpeedConfig(Section):
    """A validated ``ds_config.json``. Immutable; batch sizes are solved; ``raw`` is the configuration as given and
    ``sources`` says where each effective value came from."""

    train_batch_size: Int = Field(0, ge=0, description="Samples of one optimizer step over all ranks.")
    train_micro_batch_size_per_gpu: Int = Field(0, ge=0, description="Samples of one forward on one rank.")
    gradient_accumulation_steps: Int = Field(0, ge=0, description="Micro-batches of one optimizer step.")
    optimizer: OptimizerConfig | None = Field(None, description="The optimizer that the engine builds.")
    scheduler: SchedulerConfig | None = Field(None, description="The learning-rate schedule.")
    fp16: Fp16Config = Fp16Config()
    bf16: Bf16Config = Bf16Config()
    amp: AmpConfig = AmpConfig()
    torch_autocast: TorchAutocastConfig = TorchAutocastConfig()
    data_types: DataTypesConfig = DataTypesConfig()
    gradient_clipping: float = Field(0.0, ge=0, description="Norm to which gradients are clipped; 0 for none.")
    communication_data_type: DtypeName | None = Field(
        None, description="The dtype in which gradients are reduced; the dtype of their bucket where absent."
    )
    seq_parallel_communication_data_type: DtypeName = Field(
        "fp32", description="The dtype of reductions over sequence-parallel ranks."
    )
    gradient_allreduce_op: Literal["avg", "sum"] = Field("avg", description="Reduction of gradients over ranks.")
    prescale_gradients: bool = Field(
        False,
        description="true: divide gradients before they are reduced; false: divide the sum. Left out, gradients are "
        "divided as they are copied into their bucket, which costs nothing.",
    )
    gradient_predivide_factor: float = Field(
        1.0, gt=0, description="Divide gradients by this before they are reduced, and by the rest after."
    )
    sparse_gradients: bool = Field(False, description="Communicate gradients of sparse embeddings as sparse tensors.")
    zero_optimization: ZeroConfig = ZeroConfig()
    aio: AioConfig = AioConfig()
    zero_allow_untested_optimizer: bool = Field(False, description="Shard client optimizers: always allowed.")
    zero_force_ds_cpu_optimizer: bool = Field(True, description="Use the CPU optimizers of this package with offload.")
    steps_per_print: float | None = Field(None, description="Optimizer steps between log lines; none where absent.")
    wall_clock_breakdown: bool = Field(False, description="Log the time of forward, backward and step.")
    dump_state: bool = Field(False, description="Log the effective configuration at the start.")
    log_level: Literal["debug", "info", "warning", "error", "critical"] = Field("info", description="Level of the log.")
    memory_breakdown: bool = Field(False, description="Log memory at each reported step.")
    dataloader_drop_last: bool = Field(False, description="Drop the last incomplete batch of the training data.")
    disable_allgather: bool = Field(False, description="An old switch; false is the only mode.")
    tensorboard: TensorBoardConfig = TensorBoardConfig()
    wandb: WandbConfig = WandbConfig()
    comet: CometConfig = CometConfig()
    csv_monitor: CsvConfig = CsvConfig()
    flops_profiler: FlopsProfilerConfig = FlopsProfilerConfig()
    comms_logger: CommsLoggerConfig = CommsLoggerConfig()
    timers: ThroughputTimersConfig = ThroughputTimersConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    activation_checkpointing: ActivationCheckpointingConfig = ActivationCheckpointingConfig()
    compile: CompileConfig = CompileConfig()
    tensor_parallel: TensorParallelConfig = TensorParallelConfig()
    expert_parallel: FeatureSection = FeatureSection()
    pipeline: PipelineConfig = PipelineConfig()
    hybrid_engine: HybridEngineConfig = HybridEngineConfig()
    autotuning: FeatureSection = FeatureSection()
    sparse_attention: FeatureSection = FeatureSection()
    data_efficiency: DataSection = DataSection()
    curriculum_learning: DataSection = DataSection()
    progressive_layer_drop: FeatureSection = FeatureSection()
    eigenvalue: FeatureSection = FeatureSection()
    elasticity: FeatureSection = FeatureSection()
    compression_training: dict[str, Any] = Field(default_factory=dict, description="Compression during training.")
    nebula: FeatureSection = FeatureSection()
    datastates_ckpt: dict[str, Any] = Field(default_factory=dict, description="DataStates checkpoints.")
    managed_gradient_accumulation: bool = Field(True, description="The engine counts micro-steps.")
    use_data_before_expert_parallelism: bool = Field(False, description="Order of ranks with experts.")

    _raw: dict[str, Any] = PrivateAttr(default_factory=dict)
    _sources: dict[str, str] = PrivateAttr(default_factory=dict)

    @property
    def raw(self) -> dict[str, Any]:
        """The configuration as it was given."""
        return self._raw

    @property
    def sources(self) -> Mapping[str, str]:
        """For each key (dotted) that does not have its plain default: where its value came from."""
        return self._sources
