"""The sharded optimizer: one step over this rank's slices, streamed bucket by bucket.

The step, in order:

1. all ranks agree on the gradients' norm and on whether they are finite (:mod:`.summary`), after late gradients and those
   of parameters that were unfrozen (:mod:`.unfreezing`) are reduced too;
2. a non-finite gradient skips the step and is reported, with the parameter; the loss scale adapts;
3. unscaling and clipping become one factor, folded into the optimizer's own pass over memory;
4. bucket by bucket: the inner optimizer steps the slice, and the bucket's all-gather starts while the next one steps.

The inner ``torch.optim`` optimizer holds the flat slices in place of the model's parameters, cut into segments where
parameters have taken different steps (:mod:`deepspeed.optim.segments`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..comm.communicator import Communicator
from ..comm.operations import Pending
from ..memory.layout import Bucket
from ..optim.loss_scaling import LossScaler
from ..optim.segments import FlatShard, Segments
from ..optim.sharding import ShardUpdate, make_stepper
from .offload import DeepSpeedZeRoOffload
from .parameters import FlatParameters
from .policy import ZeroPolicy
from .reducer import GradientReducer
from .streaming import in_turn, move_with_masters, squared_norms
from .summary import GradientSummary, summarize
from .unfreezing import FrozenParameters, unfreeze

logger = logging.getLogger("DeepSpeed")


@dataclass(frozen=True)
class StepOutcome:
    """What the last step did. ``norm`` is the global gradient norm before clipping, with the loss scale taken out."""

    norm: float
    skipped: bool


class DeepSpeedOptimizer(torch.optim.Optimizer):
    """The type by which integrations recognize an optimizer of this package."""


class ShardedOptimizer(DeepSpeedOptimizer):
    """A torch optimizer whose states, and as the policy says gradients, are sharded over ranks.

    ``param_groups``, ``state`` and ``defaults`` are the inner optimizer's, live: schedulers built on either one act on
    both. ``parameter_offload`` is there where parameters are sharded: the hooks that make them whole.
    """

    parameter_offload: DeepSpeedZeRoOffload

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        flat: FlatParameters,
        reducer: GradientReducer,
        *,
        frozen: FrozenParameters,
        scaler: LossScaler,
        clip: float,
        overlap: bool,
    ):
        self.optimizer = optimizer
        self.flat = flat
        self.reducer = reducer
        self.groups = reducer.groups
        self.frozen = frozen
        self.scaler = scaler
        self.clip = clip
        self.outcome: StepOutcome | None = None
        self._overlap = overlap
        self._steps = 0
        self.shards = tuple(FlatShard(flat.masters[bucket.index], bucket, flat.shard) for bucket in flat.layout.buckets)
        self._given = [group["params"] for group in optimizer.param_groups]
        self.segments = Segments(optimizer, self.shards)
        move_with_masters(self, self.shards)
        self._stepper = make_stepper(self.segments, reducer.groups.shards)

    # -- the inner optimizer's face; class-level so that wrappers without our __dict__ keep it -----------------------

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The inner optimizer's parameter groups; their ``params`` are flat slices, or segments of them."""
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = groups

    @property
    def state(self) -> Any:
        """The inner optimizer's state, by slice or segment."""
        return self.optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self.optimizer.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        """The inner optimizer's defaults."""
        return self.optimizer.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.optimizer.defaults = defaults

    @property
    def overflow(self) -> bool:
        """Whether the last step was skipped because of a non-finite gradient."""
        return self.outcome is not None and self.outcome.skipped

    @property
    def loss_scale(self) -> float:
        """The factor by which losses are multiplied before backward."""
        return self.scaler.scale

    @property
    def cur_scale(self) -> float:
        """The same, by the name that fp16 scripts use."""
        return self.loss_scale

    @property
    def communicator(self) -> Communicator:
        """The data-parallel ranks."""
        return self.groups.everyone

    @property
    def policy(self) -> ZeroPolicy:
        """What is sharded."""
        return self.reducer.policy

    @property
    def single_partition_of_fp32_groups(self) -> list[Tensor]:
        """This rank's fp32 slices, in bucket order."""
        return [shard.tensor for shard in self.shards]

    # -- the step ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update the parameters from the gradients that backward left, and forget the gradients.

        Raises ValueError for a closure: the gradients are already reduced when a step begins.
        """
        if closure is not None:
            raise ValueError("a sharded optimizer steps on reduced gradients and cannot re-evaluate a closure")
        self.flat.presence.require("a step")
        if self.communicator.rank == 0:
            self.frozen.warn_of_unoptimized()
        self.flat.settle()
        summary = self._agree()
        norm = summary.norm / self.scaler.scale
        self._steps += 1
        self.outcome = StepOutcome(norm, skipped=not summary.finite)
        if summary.finite:
            self._update(summary, self._clip_factor(norm) / self.scaler.scale)
        else:
            self._report_non_finite()
        self.reducer.clear()
        self.scaler.update(not summary.finite)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients."""
        self.reducer.clear()
        self.frozen.forget_gradients()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused: the slices are laid out once, at ``initialize``."""
        raise RuntimeError("parameter groups cannot be added to a sharded optimizer; pass all groups to deepspeed.initialize")

    def state_dict(self) -> dict[str, Any]:
        """This rank's part: the inner optimizer's state, the fp32 slices, the loss scaler. To load it again, world
        size and stage must be the same; ``save_checkpoint`` has no such limit. RuntimeError where states lie on a disk."""
        self._refuse_out_of_memory("state_dict")
        self.flat.presence.require("optimizer.state_dict()")
        return {
            "optimizer": self.optimizer.state_dict(),
            "segments": [[segment.start for segment in self.segments.of(shard)] for shard in self.shards],
            "fp32_flat_groups": [shard.tensor.clone() for shard in self.shards],
            "scaler": self.scaler.state_dict(),
            "zero_stage": self.policy.stage,
            "partition_count": self.flat.layout.shards,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what ``state_dict`` of the same rank, world size and stage returned. RuntimeError where states lie on a
        disk."""
        self._refuse_out_of_memory("load_state_dict")
        self.flat.presence.require("optimizer.load_state_dict()")
        theirs, ours = state_dict["partition_count"], self.flat.layout.shards
        if theirs != ours:
            raise ValueError(
                f"this optimizer state is one of {theirs} slices, the engine has {ours}: use load_checkpoint, which reshapes"
            )
        # The first segment starts with the slice; a state dict from before there were segments has one for each slice.
        if len(state_dict["fp32_flat_groups"]) != len(self.shards):
            raise ValueError(
                f"this optimizer state has {len(state_dict['fp32_flat_groups'])} buckets, the engine {len(self.shards)}: other "
                "parameters were frozen at initialize or unfrozen since. Use load_checkpoint, which goes by their names."
            )
        for shard, starts in zip(self.shards, state_dict.get("segments", [[0]] * len(self.shards)), strict=True):
            self.segments.recut(shard, starts[1:])
        self.optimizer.load_state_dict(state_dict["optimizer"])
        for shard, saved in zip(self.shards, state_dict["fp32_flat_groups"], strict=True):
            shard.tensor.copy_(saved)
        self.scaler.load_state_dict(state_dict["scaler"])
        self.flat.parameters_from_masters(self.groups.shards)

    def close(self) -> None:
        """Take the hooks off the model, free gradients and optimizer states, and give the inner optimizer the model's
        parameters back."""
        self.reducer.close()
        self.optimizer.state.clear()
        for group, parameters in zip(self.optimizer.param_groups, self._given, strict=True):
            group["params"] = parameters
        self.shards = ()

    # -- steps of the step -------------------------------------------------------------------------------------------

    def _agree(self) -> GradientSummary:
        self.reducer.ensure_reduced()
        summary = self._summarize()
        late = list(summary.late)
        if summary.unfrozen:
            everyone = self.communicator.gather_objects(self.frozen.unfrozen(), purpose="agreement on unfrozen parameters")
            unfreeze(self, {name for names in everyone for name in names})
            late += [True] * (len(self.shards) - len(late))
        if any(late):
            self.reducer.reduce_late(late)
            summary = self._summarize()
        return summary

    def _summarize(self) -> GradientSummary:
        return summarize(
            squared_norms(self.reducer),
            late=self.reducer.late(),
            used=[name in self.reducer.used for name in self.flat.layout.homes],
            unfrozen=bool(self.frozen.unfrozen()),
            counts=self.groups.is_first_copy if self.policy.shard_optimizer else self.communicator.rank == 0,
            communicator=self.communicator,
            device=self.flat.buffers[0].device,
        )

    def _clip_factor(self, norm: float) -> float:
        """As ``torch.nn.utils.clip_grad_norm_``: 1 where the norm is within the limit or no limit is set."""
        return min(1.0, self.clip / (norm + 1e-6)) if self.clip > 0 else 1.0

    def _update(self, summary: GradientSummary, gradient_scale: float) -> None:
        unused = frozenset(name for name, used in zip(self.flat.layout.homes, summary.used, strict=True) if not used)
        updates = [self._shard_update(shard, gradient, unused) for shard, (_, gradient) in self._gradients()]
        gathers: list[Pending] = []

        def gather(shard: FlatShard) -> None:
            gathers.append(self.flat.gather(shard.bucket, self.groups.shards))
            if not self._overlap:
                gathers.pop().wait()

        self._stepper.step(in_turn(updates, self.flat, self.reducer), gradient_scale=gradient_scale, finished=gather)
        for pending in gathers:
            pending.wait()

    def _refuse_out_of_memory(self, name: str) -> None:
        tiers = self.flat.tiers
        if tiers.states is not None or tiers.quantized_states or tiers.split_masters:
            raise RuntimeError(
                f"{name} would have the optimizer's states, which lie on a disk or are packed (data_types), in memory at once: "
                "use save_checkpoint and load_checkpoint of the engine"
            )

    def _gradients(self) -> Iterable[tuple[FlatShard, tuple[Bucket, Tensor]]]:
        return zip(self.shards, self.reducer.gradients(), strict=True)

    def _shard_update(self, shard: FlatShard, gradient: Tensor, unused: frozenset[str]) -> ShardUpdate:
        separate = self.flat.has_separate_master(shard.bucket)
        return ShardUpdate(shard, gradient, self.flat.own_slice(shard.bucket) if separate else None, unused)

    def _report_non_finite(self) -> None:
        """Name the parameters whose reduced gradient is not finite in this rank's slices."""
        found = []
        for shard, (bucket, gradient) in self._gradients():
            with self.flat.chunks[bucket.index].reading():
                wrong = [f for f in shard.fragments if not bool(gradient[f.slice_range].isfinite().all())]
            found += [fragment.spec.name for fragment in wrong]
        if found or self.communicator.rank == 0:
            where = f" in {', '.join(found[:5])}{' and others' if len(found) > 5 else ''}" if found else ""
            logger.warning(
                "step %d skipped: non-finite gradient%s (rank %d, loss scale %g)",
                self._steps,
                where,
                self.communicator.rank,
                self.scaler.scale,
            )
