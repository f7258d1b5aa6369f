"""From a model and a configuration to the parts that the engine drives."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..comm.agreement import on_all_ranks
from ..comm.communicator import Communicator
from ..comm.sharding import ShardGroups
from ..config import DeepSpeedConfig
from ..memory.layout import ALIGNMENT, FlatLayout
from ..native.packing import BLOCK_NUMEL
from ..optim import build_optimizer, build_scheduler, has_stepped, refuse_all_at_once, refuse_unsuited, split_parameter_groups
from ..zero.arrivals import is_reduced
from ..zero.fetching import FetchLimits
from ..zero.inspection import make_inspectable
from ..zero.leaves import leaf_predicate
from ..zero.offload import DeepSpeedZeRoOffload
from ..zero.optimizer import ShardedOptimizer
from ..zero.plan import WHOLE, UnitLimits, plan_units
from ..zero.policy import ZeroPolicy
from ..zero.reducer import GradientReducer, ReductionSettings
from ..zero.released import shape_of
from ..zero.room import StateSizes, needed_room, optimizer_state_sizes, reserve_room
from ..zero.sharding import ModelLayout, ShardedModel, move_in
from ..zero.tiers import GradientTier, open_tiers, refuse_other_devices
from ..zero.unfreezing import FrozenParameters
from .agreement import check_ranks_agree, describe
from .precision import PrecisionPolicy, build_loss_scaler

PACKED_CHUNK_NUMEL = 1 << 22
"""Elements of a slice that are unpacked at once at stage 3, a larger parameter apart."""

OptimizerArgument = torch.optim.Optimizer | Callable[[Iterable[Any]], torch.optim.Optimizer] | None


def name_parameters(module: nn.Module, groups: Sequence[Mapping[str, Any]]) -> dict[str, nn.Parameter]:
    """The trainable parameters of ``groups`` by name, in the model's registration order. A tied parameter has its
    first name.

    Raises ValueError where there are none, where one is not the model's and where another engine trains one.
    """
    wanted = {id(p): p for group in groups for p in group["params"] if p.requires_grad}
    named = {name: wanted.pop(id(p)) for name, p in module.named_parameters() if id(p) in wanted}
    if wanted:
        shapes = ", ".join(str(tuple(p.shape)) for p in list(wanted.values())[:5])
        raise ValueError(
            f"{len(wanted)} of the {len(wanted) + len(named)} parameters to optimize are not parameters of the model "
            f"(shapes {shapes}): build the optimizer from the parameters of the model that deepspeed.initialize gets; "
            "those of a loss with parameters of its own belong in a module that has both"
        )
    if not named:
        raise ValueError(
            "the model has no trainable parameters: every parameter given to the optimizer has requires_grad=False"
        )
    taken = [name for name, p in named.items() if is_reduced(p)]
    if taken:
        raise ValueError(
            f"the model is already trained by an engine (its parameter '{taken[0]}' is): call destroy() of that engine "
            "before deepspeed.initialize is given the model again"
        )
    return named


def parameter_groups(module: nn.Module, parameters: Iterable[Any] | None) -> list[dict[str, Any]]:
    """Optimizer parameter groups from what ``initialize`` was given: parameters, groups, or None (then all of the
    model's)."""
    given = list(module.parameters() if parameters is None else parameters)
    if not given and parameters is not None:
        raise ValueError(
            "model_parameters is empty (an iterator that was used up before?): give the parameters to optimize, or "
            "leave it out to optimize all trainable ones"
        )
    if given and all(isinstance(item, dict) for item in given):
        return [{**group, "params": _listed(group["params"])} for group in given]
    if any(isinstance(item, dict) for item in given):
        raise ValueError("model_parameters mixes parameters and parameter groups; give either one")
    # named_parameters() is a natural thing to pass.
    return [{"params": [item[1] if isinstance(item, tuple) else item for item in given]}]


def build_layout(
    module: nn.Module,
    named: Mapping[str, nn.Parameter],
    groups: Sequence[Mapping[str, Any]],
    *,
    config: DeepSpeedConfig,
    precision: PrecisionPolicy,
    ranks: int,
) -> ModelLayout:
    """The flat layout of the module's parameters, of which ``named`` are trained in ``groups``."""
    policy = ZeroPolicy.for_stage(config.zero_optimization.stage)
    group_of = {id(p): index for index, group in enumerate(groups) for p in group["params"]}
    plan = plan_units(module, lambda p: shape_of(p).numel(), unit_limits(config)) if policy.shard_parameters else WHOLE
    lay_out = partial(
        FlatLayout.build,
        shards=ranks if policy.shard_optimizer else 1,
        bucket_numel=config.zero_optimization.bucket_numel,
        unit_bucket_numel=chunk_numel(config) * ranks,
        # Blocks of 8-bit states then neither straddle parameters nor depend on how many ranks share a slice.
        alignment=BLOCK_NUMEL if config.data_types.optimizer_state_bits == 8 else ALIGNMENT,
    )
    return ModelLayout.build(
        module,
        {name: group_of[id(p)] for name, p in named.items()},
        plan,
        dtype_of=precision.dtype_of,
        lay_out=lay_out,
    )


def chunk_numel(config: DeepSpeedConfig) -> int:
    """The most elements of a slice that the step has in memory as a chunk, a larger parameter apart: the buffers, of fp32
    elements, hold as many chunks of 16 bytes per element as there are at once."""
    zero = config.zero_optimization
    offload = zero.offload_optimizer
    if offload.device != "nvme":
        return PACKED_CHUNK_NUMEL if config.data_types.packs else sys.maxsize
    at_once = 1 + offload.reads_ahead + offload.writes_behind
    return max(1, min(zero.sub_group_size, offload.buffer_count * offload.buffer_size // (4 * at_once)))


def unit_limits(config: DeepSpeedConfig) -> UnitLimits:
    """What decides which parameters are gathered together."""
    zero = config.zero_optimization
    return UnitLimits(
        resident_numel=zero.stage3_param_persistence_threshold,
        resident_total=zero.stage3_model_persistence_threshold,
        largest=zero.stage3_max_live_parameters,
        is_leaf=leaf_predicate(zero.leaf_module.classes, zero.leaf_module.names, zero.leaf_module.name_suffixes),
        granularity=zero.stage3_module_granularity_threshold,
    )


def fetch_limits(config: DeepSpeedConfig) -> FetchLimits:
    """What bounds the parameters that are whole at once, and whether wrong guesses are logged."""
    zero = config.zero_optimization
    return FetchLimits(
        ahead=min(zero.stage3_prefetch_bucket_size, zero.offload_param.most_ahead),
        reuse=zero.stage3_max_reuse_distance,
        live=zero.stage3_max_live_parameters,
        log_misses=zero.log_trace_cache_warnings,
    )


def reduction_settings(config: DeepSpeedConfig, precision: PrecisionPolicy, *, ranks: int) -> ReductionSettings:
    """How gradients are divided and communicated.

    The mean over ranks costs nothing where the division happens as a gradient is copied into its bucket, so that is
    where it happens unless ``prescale_gradients`` is set: false divides the sum, true with a
    ``gradient_predivide_factor`` divides by the factor before and by the rest after. A ``gradient_allreduce_op`` of sum
    divides by 1 in all.
    """
    divisor = 1.0 if config.gradient_allreduce_op == "sum" else float(ranks)
    factor = config.gradient_predivide_factor
    before = divisor if factor == 1.0 and config.prescale_gradients is not False else factor
    zero = config.zero_optimization
    return ReductionSettings(
        divide_before=before,
        divide_after=divisor / before,
        communication_dtype=precision.communication_dtype,
        kept_dtype=precision.kept_dtype(config.gradient_accumulation_steps),
        overlap=zero.overlap_comm,
        reduce_scatter=zero.reduce_scatter,
    )


def shard_groups(config: DeepSpeedConfig, communicator: Communicator) -> ShardGroups:
    """The groups of ranks over which states are sharded. Called on all ranks."""
    size = config.zero_optimization.mics_shard_size
    return ShardGroups.of_size(communicator, size) if size > 0 else ShardGroups.whole(communicator)


def fetch_groups(config: DeepSpeedConfig, groups: ShardGroups) -> ShardGroups:
    """The groups of ranks over which units are fetched. Called on all ranks."""
    nearby = config.zero_optimization.zero_hpz_partition_size
    fetching = groups.duplicate()
    return fetching.with_second_copy(nearby) if nearby > 1 else fetching


@dataclass(frozen=True)
class OptimizerRequest:
    """What the user asked to optimize with: a client optimizer or a callable, or parameters for the configured one."""

    optimizer: OptimizerArgument = None
    parameters: Iterable[Any] | None = None


def shard_model(
    module: nn.Module,
    request: OptimizerRequest,
    *,
    config: DeepSpeedConfig,
    precision: PrecisionPolicy,
    communicator: Communicator,
) -> tuple[ShardedModel, ShardedOptimizer | None]:
    """Shard the model's states over ``communicator`` as the configuration says, and convert the model to its dtype.

    The optimizer is None where neither a client optimizer nor a configured one is there: an engine for inference.
    """

    prepare = partial(_optimizer_and_names, module, request, config)
    optimizer, named = on_all_ranks(prepare, communicator, what="deepspeed.initialize")
    check_ranks_agree(describe(module, optimizer, config), communicator)
    options = optimizer.param_groups if optimizer is not None else []
    groups = shard_groups(config, communicator)
    layout = build_layout(module, named, options, config=config, precision=precision, ranks=groups.shards.size)
    fetching = fetch_groups(config, groups) if layout.plan.names else groups
    tiers = on_all_ranks(lambda: open_tiers(config), communicator, what="deepspeed.initialize")
    policy = ZeroPolicy.for_stage(config.zero_optimization.stage)
    if tiers.parameters is not None or tiers.states is not None:
        sizes = StateSizes(
            optimizer_state_sizes(optimizer, groups.shards) if optimizer is not None and tiers.states is not None else (),
            gradients=policy.shard_gradients,
            gradient_dtype=precision.kept_dtype(config.gradient_accumulation_steps),
        )
        reserve_room(module, needed_room(layout, tiers, sizes), tiers, communicator)
    model = move_in(module, layout, groups, fetching, fetch_limits(config), tiers)
    moved = {id(p) for flat in (model.trained, model.frozen) for p in flat.parameters.values()}
    precision.cast_module(module, keep=lambda tensor: id(tensor) in moved)
    _broadcast_rest(module, moved, communicator)
    if optimizer is None:
        return model, None
    size = config.zero_optimization.bucket_numel
    frozen = FrozenParameters(dict(module.named_parameters()), options, bucket_numel=size)
    settings = reduction_settings(config, precision, ranks=communicator.size)
    below = GradientTier(tiers.states) if tiers.states is not None and policy.shard_gradients else None
    reducer = GradientReducer(
        layout.trained,
        named,
        policy=policy,
        groups=groups,
        settings=settings,
        tier_of=lambda bucket: below if model.trained.state_tiers[bucket.index] is not None else None,
    )
    sharded = ShardedOptimizer(
        optimizer,
        model.trained,
        reducer,
        frozen=frozen,
        scaler=build_loss_scaler(config),
        clip=config.gradient_clipping,
        overlap=settings.overlap,
    )
    model.scopes.unit_done = reducer.unit_done
    reducer.presence = model.trained.presence
    if policy.shard_parameters:
        sharded.parameter_offload = DeepSpeedZeRoOffload(module, model.scopes)
    make_inspectable(sharded)
    return model, sharded


def build_lr_scheduler(scheduler: Any, optimizer: ShardedOptimizer | None, config: DeepSpeedConfig) -> Any:
    """The learning-rate scheduler: a ready object, one made by a callable from the inner optimizer, or the configured
    one; None where there is none or nothing to schedule. One that cannot be built takes the optimizer down with it."""
    if scheduler is not None and (hasattr(scheduler, "step") or not callable(scheduler)):
        return scheduler
    if optimizer is None:
        return None
    try:
        if scheduler is not None:
            return scheduler(optimizer.optimizer)
        if config.scheduler is not None and config.scheduler.type:
            return build_scheduler(config.scheduler.type, config.scheduler.params, optimizer.optimizer)
    except Exception:
        optimizer.close()
        raise
    return None


def _optimizer_and_names(
    module: nn.Module, request: OptimizerRequest, config: DeepSpeedConfig
) -> tuple[torch.optim.Optimizer | None, dict[str, nn.Parameter]]:
    """The optimizer, where there is one, and the parameters that it trains by name."""
    refuse_other_devices(config)
    optimizer = _inner_optimizer(module, request, config)
    if optimizer is None:
        return None, {}
    if config.zero_optimization.offload_optimizer.device == "nvme":
        refuse_all_at_once(optimizer, "cannot lie on a disk: set zero_optimization.offload_optimizer.device to cpu or none")
    if config.data_types.packs:
        refuse_all_at_once(optimizer, "cannot be packed: leave data_types.optimizer_state_bits and split_master out")
    return optimizer, name_parameters(module, optimizer.param_groups)


def _inner_optimizer(module: nn.Module, request: OptimizerRequest, config: DeepSpeedConfig) -> torch.optim.Optimizer | None:
    client = request.optimizer
    if isinstance(client, torch.optim.Optimizer):
        refuse_unsuited(client)
        if has_stepped(client):
            raise ValueError(
                f"the {type(client).__name__} given to deepspeed.initialize has already stepped; its state cannot be "
                "sharded. Pass a new optimizer."
            )
        return client
    if client is None and config.optimizer is None:
        return None
    groups = parameter_groups(module, request.parameters)
    if client is not None:
        if not callable(client):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer or a callable, got {type(client).__name__}")
        made = client(groups if any(len(group) > 1 for group in groups) else groups[0]["params"])
        refuse_unsuited(made)
        return made
    assert config.optimizer is not None, "checked above"
    kind = config.optimizer.type
    return build_optimizer(kind, config.optimizer.params, split_parameter_groups(kind, groups))


def _broadcast_rest(module: nn.Module, moved: set[int], communicator: Communicator) -> None:
    """Give every rank rank 0's frozen parameters and buffers; the trainable ones have been broadcast already."""
    rest: list[Tensor] = [t for t in [*module.parameters(), *module.buffers()] if id(t) not in moved]
    for tensor in rest:
        if tensor.numel() and not tensor.is_meta:
            value = tensor.detach().contiguous()
            communicator.broadcast(value, purpose="broadcast of buffers and frozen parameters").wait()
            tensor.data.copy_(value)


def _listed(parameters: Any) -> list[nn.Parameter]:
    return [parameters] if isinstance(parameters, nn.Parameter) else list(parameters)
