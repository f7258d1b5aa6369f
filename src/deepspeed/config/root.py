"""The whole configuration: top-level keys and sections."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, PrivateAttr

from .checkpointing import ActivationCheckpointingConfig, CheckpointConfig, DataStatesConfig, NebulaConfig
from .compression import CompressionConfig, SparseAttentionConfig
from .data import CurriculumConfig, DataEfficiencyConfig, EigenvalueConfig, ProgressiveLayerDropConfig
from .monitoring import (
    CometConfig,
    CommsLoggerConfig,
    CsvConfig,
    FlopsProfilerConfig,
    TensorBoardConfig,
    ThroughputTimersConfig,
    WandbConfig,
)
from .offload import AioConfig
from .optimization import OptimizerConfig, SchedulerConfig
from .origin import DEFAULT, Origin
from .parallel import ExpertParallelConfig, HybridEngineConfig, PipelineConfig, TensorParallelConfig
from .precision import AmpConfig, Bf16Config, DataTypesConfig, DtypeName, Fp16Config, TorchAutocastConfig
from .section import AnyReal, Int, Lowered, Real, Section, key
from .tuning import AutotuningConfig, CompileConfig, ElasticityConfig
from .zero import ZeroConfig


class RootSection(Section):
    """The keys of ``ds_config.json``, validated. Immutable; ``raw`` is the configuration as given and ``origin`` says where an
    effective value came from."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), title="DeepSpeedConfig")

    train_batch_size: Int = key(1, "One optimizer step over all ranks. Left out: the product below.", unit="samples", ge=1)
    train_micro_batch_size_per_gpu: Int = key(1, "One forward on one rank. Left out: solved, or 1.", unit="samples", ge=1)
    gradient_accumulation_steps: Int = key(
        1, "Forwards of one optimizer step. Left out: solved, or 1.", unit="micro-batches", ge=1
    )
    managed_gradient_accumulation: bool = key(True, "The engine counts micro-batches and steps at the last one.")
    optimizer: OptimizerConfig | None = key(None, "The optimizer that the engine builds.")
    scheduler: SchedulerConfig | None = key(None, "The learning-rate schedule.")
    fp16: Fp16Config = Fp16Config()
    bf16: Bf16Config = Bf16Config()
    amp: AmpConfig = AmpConfig()
    torch_autocast: TorchAutocastConfig = TorchAutocastConfig()
    data_types: DataTypesConfig = DataTypesConfig()
    gradient_clipping: Real = key(0.0, "Norm to which gradients are clipped; 0 for none.", unit="norm", ge=0)
    communication_data_type: DtypeName | None = key(
        None, "The dtype in which gradients are reduced. Left out: the dtype of their bucket."
    )
    seq_parallel_communication_data_type: DtypeName = key("fp32", "The dtype of reductions over sequence-parallel ranks.")
    gradient_allreduce_op: Literal["mean", "avg", "sum"] = key("mean", "How gradients of the ranks are joined; avg is mean.")
    prescale_gradients: bool | None = key(
        None,
        "true: divide gradients before they are reduced; false: divide the sum. Left out, they are divided as they are "
        "copied into their bucket, which costs nothing.",
    )
    gradient_predivide_factor: Real = key(
        1.0, "Divide gradients by this before they are reduced, and by the rest after.", unit="factor", gt=0
    )
    sparse_gradients: bool = key(False, "Communicate gradients of sparse embeddings as sparse tensors.")
    zero_optimization: ZeroConfig = ZeroConfig()
    aio: AioConfig = AioConfig()
    zero_allow_untested_optimizer: bool = key(
        False, "Shard optimizers given to initialize: always allowed here, either value is right."
    )
    zero_force_ds_cpu_optimizer: bool = key(
        True, "With offload_optimizer, require an optimizer of this package. Without it, no effect."
    )
    steps_per_print: AnyReal | None = key(
        None, "How often a line is logged; left out, 0 or infinite: never.", unit="optimizer steps", ge=0
    )
    wall_clock_breakdown: bool = key(False, "Log the time of forward, backward and step.")
    dump_state: bool = key(False, "Log the effective configuration at the start.")
    memory_breakdown: bool = key(False, "Log memory at each reported step.")
    log_level: Annotated[Literal["debug", "info", "warning", "error", "critical"], Lowered] | None = key(
        None, "Level of the logger DeepSpeed, in any case. Left out, it is not touched."
    )
    dataloader_drop_last: bool = key(False, "Drop the last incomplete batch of the training data.")
    disable_allgather: bool = key(False, "An old switch of how updated parameters are gathered.")
    disable_python_gc: bool = key(False, "Collect Python's cyclic garbage only when asked.")
    use_data_before_expert_parallelism: bool = key(False, "With experts: order data-parallel ranks before them.")
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
    expert_parallel: ExpertParallelConfig = ExpertParallelConfig()
    pipeline: PipelineConfig = PipelineConfig()
    hybrid_engine: HybridEngineConfig = HybridEngineConfig()
    autotuning: AutotuningConfig = AutotuningConfig()
    elasticity: ElasticityConfig = ElasticityConfig()
    sparse_attention: SparseAttentionConfig = SparseAttentionConfig()
    data_efficiency: DataEfficiencyConfig = DataEfficiencyConfig()
    curriculum_learning: CurriculumConfig = CurriculumConfig()
    progressive_layer_drop: ProgressiveLayerDropConfig = ProgressiveLayerDropConfig()
    eigenvalue: EigenvalueConfig = EigenvalueConfig()
    compression_training: CompressionConfig = CompressionConfig()
    nebula: NebulaConfig = NebulaConfig()
    datastates_ckpt: DataStatesConfig | None = key(None, "Checkpoints through DataStates.")

    _raw: dict[str, Any] = PrivateAttr(default_factory=dict)
    _sources: dict[str, Origin] = PrivateAttr(default_factory=dict)

    @property
    def raw(self) -> dict[str, Any]:
        """The configuration as it was given."""
        return self._raw

    @property
    def sources(self) -> Mapping[str, Origin]:
        """For each key (dotted) that does not have its plain default: where its value came from."""
        return self._sources

    def origin(self, path: str) -> Origin:
        """Where the effective value of the key ``path`` (dotted) came from."""
        return self._sources.get(path, DEFAULT)

    def gives(self, section: str) -> bool:
        """Whether the configuration has a key of ``section``, under that name or another."""
        return any(path.startswith(f"{section}.") for path in self._sources)
