"""The public names, pinned: adding one or taking one away is a decision, made here."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

import deepspeed

PACKAGE = Path(deepspeed.__file__).parent
ROOF = ("ops", "runtime", "utils")
"""Rooms that hold documented import paths and nothing else."""

SAFE = [
    f"safe_{verb}_{part}_{what}"
    for verb in ("get", "set")
    for part in ("full", "local")
    for what in ("fp32_param", "grad", "optimizer_state")
]
SCHEDULES = ["LRRangeTest", "OneCycle", "WarmupCosineLR", "WarmupDecayLR", "WarmupLR"]
SCHEDULE_CONSTANTS = [
    *["COS_MIN_RATIO", "CYCLE_FIRST_STEP_SIZE", "CYCLE_MAX_LR", "CYCLE_MAX_MOM", "CYCLE_MIN_LR", "CYCLE_MIN_MOM"],
    *["DECAY_LR_RATE", "DECAY_MOM_RATE", "DECAY_STEP_SIZE", "LR_RANGE_TEST", "LR_RANGE_TEST_MIN_LR"],
    *["LR_RANGE_TEST_STAIRCASE", "LR_RANGE_TEST_STEP_RATE", "LR_RANGE_TEST_STEP_SIZE", "ONE_CYCLE", "TOTAL_NUM_STEPS"],
    *["VALID_LR_SCHEDULES", "WARMUP_COSINE_LR", "WARMUP_DECAY_LR", "WARMUP_LINEAR_RATE", "WARMUP_LOG_RATE", "WARMUP_LR"],
    *["WARMUP_MAX_LR", "WARMUP_MIN_LR", "WARMUP_MIN_RATIO", "WARMUP_NUM_STEPS", "WARMUP_TYPE"],
]

CHECKPOINTING = [
    *["CheckpointFunction", "CudaRNGStatesTracker", "checkpoint", "configure", "get_cuda_rng_tracker", "is_configured"],
    *["model_parallel_cuda_manual_seed", "non_reentrant_checkpoint", "partition_activations_in_checkpoint", "reset"],
    *["set_num_layers"],
]


def estimators(stage: int) -> list[str]:
    name = f"estimate_zero{stage}_model_states_mem_needs"
    return [name, f"{name}_all_cold", f"{name}_all_live"]


NAMES: dict[str, list[str]] = {
    "": [
        *["DeepSpeedConfig", "DeepSpeedEngine", "OnDevice", "__version__", "add_config_arguments", "get_accelerator"],
        *["init_distributed", "initialize"],
        *["accelerator", "checkpoint", "checkpointing", "comm", "monitor", "ops", "profiling", "runtime", "utils", "zero"],
    ],
    "accelerator": ["Accelerator", "get_accelerator", "is_current_accelerator_supported"],
    "comm": [
        *["ReduceOp", "all_gather", "all_gather_into_tensor", "all_gather_object", "all_reduce", "all_to_all"],
        *["all_to_all_single", "barrier", "broadcast", "broadcast_object_list", "destroy_process_group", "gather"],
        *["get_backend", "get_global_rank", "get_local_rank", "get_rank", "get_world_size", "init_distributed", "irecv"],
        *["is_initialized", "isend", "log_summary", "new_group", "recv", "reduce", "reduce_scatter", "scatter", "send"],
    ],
    "monitor.config": ["CSVConfig", "CometConfig", "DeepSpeedMonitorConfig", "TensorBoardConfig", "WandbConfig"],
    "monitor.monitor": [
        "CometMonitor",
        "Event",
        "Monitor",
        "MonitorMaster",
        "TensorBoardMonitor",
        "WandbMonitor",
        "csvMonitor",
    ],
    "checkpoint.activations.checkpointing": CHECKPOINTING,
    "ops": ["__compatible_ops__", "adagrad", "adam", "aio", "lamb", "lion", "op_builder"],
    "ops.adagrad": ["DeepSpeedCPUAdagrad"],
    "ops.adam": ["DeepSpeedCPUAdam", "FusedAdam"],
    "ops.aio": ["AsyncIOBuilder"],
    "ops.lamb": ["FusedLamb"],
    "ops.lion": ["DeepSpeedCPULion", "FusedLion"],
    "ops.op_builder": ["AsyncIOBuilder"],
    "profiling.flops_profiler": ["FlopsProfiler", "get_model_profile"],
    "runtime": [
        *["activation_checkpointing", "base_optimizer", "config", "dataloader", "engine", "lr_schedules", "utils", "zero"],
    ],
    "runtime.activation_checkpointing": ["checkpointing"],
    "runtime.activation_checkpointing.checkpointing": CHECKPOINTING,
    "runtime.base_optimizer": ["DeepSpeedOptimizer"],
    "runtime.config": ["DeepSpeedConfig"],
    "runtime.dataloader": ["RepeatingLoader"],
    "runtime.engine": ["DeepSpeedEngine"],
    "runtime.lr_schedules": [*SCHEDULES, *SCHEDULE_CONSTANTS],
    "runtime.utils": ["move_to_device", "see_memory_usage"],
    "runtime.zero": [
        *["GatheredParameters", "Init", "ZeroParamStatus", "config", "offload_config", "offload_states"],
        *["parameter_offload", "partition_parameters", "stage3", "stage_1_and_2", "tiling"],
    ],
    "runtime.zero.parameter_offload": ["DeepSpeedZeRoOffload"],
    "runtime.zero.partition_parameters": [
        *["GatheredParameters", "Init", "ZeroParamStatus", "_orig_torch_arange", "get_accelerator"],
        "zero_wrapper_for_fp_tensor_constructor",
    ],
    "runtime.zero.config": [
        *["DeepSpeedZeroConfig", "DeepSpeedZeroOffloadOptimizerConfig", "DeepSpeedZeroOffloadParamConfig"],
    ],
    "runtime.zero.offload_config": ["OffloadDeviceEnum", "OffloadStateTypeEnum"],
    "runtime.zero.offload_states": ["get_state_devices"],
    "runtime.zero.stage3": estimators(3),
    "runtime.zero.stage_1_and_2": ["DeepSpeedZeroOptimizer", *estimators(2)],
    "runtime.zero.tiling": ["TiledLinear", "TiledLinearReturnBias"],
    "utils": [
        *[*SAFE, "RepeatingLoader", "groups", "log_dist", "logger", "logging", "safe_update_full_grad_vectorized"],
        *["get_z3_leaf_modules", "set_z3_leaf_module", "set_z3_leaf_modules", "set_z3_leaf_modules_by_name"],
        *["set_z3_leaf_modules_by_suffix", "unset_z3_leaf_modules", "z3_leaf_module", "zero_to_fp32"],
    ],
    "utils.groups": [
        *[f"_get_data_parallel_{what}" for what in ("group", "rank", "world_size")],
        *[f"_get_sequence_parallel_{what}" for what in ("rank", "world_size")],
    ],
    "utils.logging": ["log_dist", "logger"],
    "zero": [
        *["GatheredParameters", "Init", "TiledLinear", "ZeroParamStatus", "register_external_parameter"],
        "unregister_external_parameter",
    ],
    "utils.zero_to_fp32": [
        *["convert_zero_checkpoint_to_fp32_state_dict", "get_fp32_state_dict_from_zero_checkpoint"],
        *["get_model_state_file", "get_optim_files", "load_state_dict_from_zero_checkpoint", "main"],
    ],
}


def module_name(path: Path) -> str:
    """The dotted name below the package: ``runtime.zero``."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def sources(*rooms: str) -> list[Path]:
    return sorted(path for room in rooms for path in (PACKAGE / room).rglob("*.py"))


@pytest.mark.parametrize("module", NAMES)
def test_a_module_has_its_public_names_and_no_others(module):
    found = importlib.import_module(".".join(filter(None, ["deepspeed", module])))
    assert sorted(found.__all__) == sorted(NAMES[module])
    for name in NAMES[module]:
        assert getattr(found, name) is not None


def test_every_module_of_the_roof_is_pinned():
    assert {module_name(path) for path in sources(*ROOF)} == {name for name in NAMES if name.split(".")[0] in ROOF}


@pytest.mark.parametrize("path", sources(*ROOF), ids=module_name)
def test_the_roof_only_imports(path):
    docstring, *body = ast.parse(path.read_text()).body
    assert isinstance(docstring, ast.Expr)
    names = [node for node in body if isinstance(node, ast.Assign)]
    assert len(names) == 1 and ast.unparse(names[0].targets[0]) == "__all__"
    assert all(isinstance(node, ast.ImportFrom) for node in body if node is not names[0])


def imported_rooms(path: Path) -> set[str]:
    """The first-level rooms of the package that a file imports, wherever in the file."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            package = path.relative_to(PACKAGE).parts[:-1]
            base = package[: len(package) - node.level + 1]
            target = [*base, *(node.module or "").split(".")]
            rooms |= {target[0]} if any(target) else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("deepspeed"):
            rooms.add((node.module or "").removeprefix("deepspeed").strip(".").split(".")[0])
        elif isinstance(node, ast.Import):
            rooms |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("deepspeed.")}
    return rooms


def test_nothing_below_the_roof_imports_it():
    below = [path for path in PACKAGE.rglob("*.py") if path.relative_to(PACKAGE).parts[0] not in (*ROOF, "__init__.py")]
    assert {module_name(path): imported_rooms(path) & set(ROOF) for path in below if imported_rooms(path) & set(ROOF)} == {}


def test_names_that_integrations_compare_are_the_same_objects():
    from deepspeed.runtime.base_optimizer import DeepSpeedOptimizer
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
    from deepspeed.utils import logger
    from deepspeed.utils.logging import logger as same_logger

    assert deepspeed.DeepSpeedEngine is DeepSpeedEngine
    assert issubclass(DeepSpeedZeroOptimizer, DeepSpeedOptimizer)
    assert logger is same_logger is deepspeed.utils.logging.logger
    assert deepspeed.runtime.lr_schedules.VALID_LR_SCHEDULES[0] == "LRRangeTest"


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'deepspeed' has no attribute 'initialise'"):
        deepspeed.initialise  # noqa: B018
