"""Sections ``checkpoint``, ``activation_checkpointing``, ``nebula`` and ``datastates_ckpt``."""

from __future__ import annotations

from typing import Annotated, Literal

from .errors import Problem
from .section import Int, Lowered, OpenSection, Section, key


class ParallelWriteConfig(Section):
    """Which ranks write a checkpoint."""

    pipeline_stage: bool = key(False, "All pipeline stages write: every rank does here, either value is right.")


class CheckpointConfig(Section):
    """Saving and loading."""

    tag_validation: Annotated[Literal["ignore", "warn", "fail"], Lowered] = key(
        "warn", "What happens where ranks save under different tags: ignore, warn or fail, in any case."
    )
    format: Annotated[Literal["fragments", "deepspeed"], Lowered] = key(
        "fragments",
        "The files of a checkpoint: fragments in safetensors, or deepspeed for the pickled ones of the original DeepSpeed, "
        "which are made of the former and take the disk three times meanwhile. Either is loaded without being asked for.",
    )
    load_universal: bool = key(False, "Load at another world size or stage: always possible here, either value is right.")
    async_save: bool = key(
        False, "Return from save_checkpoint when the states are copied to CPU memory, and write them beside training."
    )
    keep_last: Int | None = key(
        None,
        "Checkpoints that stay in a directory: older ones are removed after each save. All where None.",
        ge=1,
        unit="checkpoints",
    )
    use_node_local_storage: bool = key(False, "Every host has a directory of its own.")
    parallel_write: ParallelWriteConfig = ParallelWriteConfig()

    def contradictions(self) -> list[Problem]:
        """What is wrong with the combination of keys."""
        if self.format != "deepspeed":
            return []
        sentence = "works with checkpoint.format fragments alone. Remove one of the two keys."
        problems = []
        if self.async_save:
            problems.append(Problem("checkpoint.async_save", sentence))
        if self.keep_last is not None:
            problems.append(Problem("checkpoint.keep_last", sentence))
        return problems


class ActivationCheckpointingConfig(Section):
    """How ``deepspeed.checkpointing.checkpoint`` keeps the inputs of what it recomputes in backward."""

    partition_activations: bool = key(False, "Split each input over the model-parallel ranks; gather it in backward.")
    cpu_checkpointing: bool = key(False, "Keep inputs in CPU memory.")
    contiguous_memory_optimization: bool = key(
        False, "Keep inputs in buffers made once; needs partition_activations and number_checkpoints."
    )
    number_checkpoints: Int | None = key(
        None, "Most checkpoints that wait for their backward, to size those buffers.", unit="checkpoints", ge=1
    )
    synchronize_checkpoint_boundary: bool = key(
        False, "Wait for the device where the forward and the backward of a checkpoint begin and end."
    )
    profile: bool = key(False, "Log the time of forward and backward of each checkpoint; waits for the device too.")

    def contradictions(self) -> list[Problem]:
        """What is wrong with the combination of keys."""
        if not self.contiguous_memory_optimization:
            return []
        section, problems = "activation_checkpointing", []
        if not self.partition_activations:
            sentence = "is false; contiguous_memory_optimization works with it alone. Set both to true, or both to false."
            problems.append(Problem(f"{section}.partition_activations", sentence))
        if self.number_checkpoints is None:
            sentence = "is missing; contiguous_memory_optimization needs the number of checkpoints of a forward."
            problems.append(Problem(f"{section}.number_checkpoints", sentence))
        return problems


class NebulaConfig(Section):
    """Checkpoints through Nebula."""

    enabled: bool = key(False, "Save through Nebula.")
    persistent_storage_path: str | None = key(None, "Where checkpoints last.")
    persistent_time_interval: Int = key(100, "Time between two that last.", unit="seconds", ge=1)
    num_of_version_in_retention: Int = key(2, "Checkpoints kept.", unit="checkpoints", ge=1)
    enable_nebula_load: bool = key(True, "Load through Nebula.")
    load_path: str | None = key(None, "Where to load from.")


class DataStatesConfig(OpenSection):
    """Checkpoints through DataStates; its other keys are DataStates'. On where the section has any key."""

    enabled: bool = key(True, "false switches it off.")
