"""The engines that the benchmark compares, behind one small face: a micro-step computes gradients, an update uses them.

``deepspeed`` is whichever package of that name the interpreter has; only its documented interface is used.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from gpt import GPT
from torch import Tensor, nn

LEARNING_RATE = 3e-4
BETAS = (0.9, 0.95)
EPSILON = 1e-8
WEIGHT_DECAY = 0.1


@dataclass(frozen=True)
class Setup:
    """What to train with. ``optimizer`` concerns deepspeed alone: ``config`` takes its own AdamW, ``torch_adam`` asks
    it for torch's, ``client`` hands it torch's fused AdamW, which is what the other engines use."""

    engine: str
    stage: int
    accumulation: int
    precision: str
    micro_batch: int
    optimizer: str


class Engine(Protocol):
    """One data-parallel rank."""

    def __init__(self, model: GPT, setup: Setup) -> None: ...

    def backward(self, tokens: Tensor, *, last: bool) -> Tensor:
        """Add the gradients of one micro-batch; ``last`` before an update. Returns the loss."""

    def step(self) -> None:
        """Update the parameters after the last micro-batch, and forget the gradients."""


def build_engine(model: GPT, setup: Setup) -> Engine:
    """The engine that ``setup`` names, around ``model``; the process group is there already."""
    engines: dict[str, type[Engine]] = {"deepspeed": DeepSpeed, "ddp": DistributedDataParallel, "fsdp2": FullyShard}
    return engines[setup.engine](model, setup)


def _adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=BETAS, eps=EPSILON, weight_decay=WEIGHT_DECAY, fused=True
    )


class DistributedDataParallel:
    """torch's DDP: everything whole on every rank, gradients all-reduced on the last micro-batch."""

    def __init__(self, model: GPT, setup: Setup) -> None:
        self.setup = setup
        self.model = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
        self.optimizer = _adamw(model)

    def backward(self, tokens: Tensor, *, last: bool) -> Tensor:
        """See :class:`Engine`."""
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=self.setup.precision == "bf16")
        with nullcontext() if last else self.model.no_sync():
            with autocast:
                loss: Tensor = self.model(tokens)
            (loss / self.setup.accumulation).backward()
        return loss.detach()

    def step(self) -> None:
        """See :class:`Engine`."""
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


class FullyShard:
    """torch's FSDP2, a unit per block. Stage 3 frees parameters after forward; stage 2 keeps them until backward."""

    def __init__(self, model: GPT, setup: Setup) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        if setup.stage not in (2, 3):
            raise ValueError(f"fsdp2 is ZeRO stage 3, or 2 when it keeps parameters after forward; got {setup.stage}")
        self.setup = setup
        options: dict[str, Any] = {
            "mesh": init_device_mesh("cpu", (dist.get_world_size(),)),
            "reshard_after_forward": setup.stage == 3,
        }
        if setup.precision == "bf16":
            options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for block in model.blocks:
            fully_shard(block, **options)
        fully_shard(model, **options)
        self.model: Any = model
        self.optimizer = _adamw(model)

    def backward(self, tokens: Tensor, *, last: bool) -> Tensor:
        """See :class:`Engine`. Every micro-batch is reduced, so that gradients stay sharded."""
        self.model.set_is_last_backward(last)
        loss: Tensor = self.model(tokens)
        (loss / self.setup.accumulation).backward()
        return loss.detach()

    def step(self) -> None:
        """See :class:`Engine`."""
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


class DeepSpeed:
    """The installed ``deepspeed``, through ``initialize``, ``backward`` and ``step``."""

    def __init__(self, model: GPT, setup: Setup) -> None:
        import deepspeed

        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": setup.micro_batch,
            "gradient_accumulation_steps": setup.accumulation,
            "zero_optimization": {"stage": setup.stage},
            "steps_per_print": 1_000_000,
            "gradient_clipping": 0.0,
        }
        if setup.precision == "bf16":
            config["bf16"] = {"enabled": True}
        client = None
        if setup.optimizer == "client":
            client = _adamw(model)
            config["zero_allow_untested_optimizer"] = True
        else:
            params = {"lr": LEARNING_RATE, "betas": list(BETAS), "eps": EPSILON, "weight_decay": WEIGHT_DECAY}
            if setup.optimizer == "torch_adam":
                params["torch_adam"] = True
            config["optimizer"] = {"type": "AdamW", "params": params}
        self.engine, *_ = deepspeed.initialize(
            model=model, model_parameters=list(model.parameters()), optimizer=client, config=config
        )

    def backward(self, tokens: Tensor, *, last: bool) -> Tensor:
        """See :class:`Engine`. deepspeed's ``step`` is called after every micro-batch and counts them itself."""
        loss: Tensor = self.engine(tokens)
        self.engine.backward(loss)
        if not last:
            self.engine.step()
        return loss.detach()

    def step(self) -> None:
        """See :class:`Engine`."""
        self.engine.step()
