"""A small regression trained in a loop: by plain PyTorch, and what Accelerate needs for the same."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from accelerate import Accelerator, DeepSpeedPlugin, PartialState
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from .common import weights

TOLERANCE = 1e-6
WIDTH, BATCH, ACCUMULATION, STEPS = 10, 3, 2, 4
LR, MOMENTUM, CLIP = 0.2, 0.9, 0.3


def perceptron(seed: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(WIDTH, 21), nn.Tanh(), nn.Linear(21, 1))


def samples(batch: int) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(BATCH * 2 * ACCUMULATION * STEPS, WIDTH, generator=generator)
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True).sin()), batch_size=batch)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM)


def schedule(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))


@cache
def plain(world: int, seed: int = 3, decay: int = 0, scale: float = 1.0) -> dict[str, Tensor]:
    """The training in one process; a batch has all ranks' samples. The schedule is ``schedule``, stepped ``decay`` times
    after each step; losses are multiplied by ``scale``."""
    model = perceptron(seed)
    optimizer = sgd(model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step * decay))
    for index, (x, y) in enumerate(samples(BATCH * world)):
        (nn.functional.mse_loss(model(x), y) * scale / ACCUMULATION).backward()
        if (index + 1) % ACCUMULATION == 0:
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
    return weights(model)


def make_accelerator(stage: int, **options: Any) -> Accelerator:
    # Without an accelerator device, this is how Accelerate learns that there are several ranks.
    PartialState(cpu=True)
    settings = {"gradient_clipping": CLIP, "gradient_accumulation_steps": ACCUMULATION, "zero3_save_16bit_model": True}
    return Accelerator(deepspeed_plugin=DeepSpeedPlugin(zero_stage=stage, **settings), **options)


def train(accelerator: Accelerator, model: nn.Module, optimizer: Any, loader: Any, scheduler: Any) -> None:
    """The loop of Accelerate's documentation."""
    for x, y in loader:
        with accelerator.accumulate(model):
            loss = nn.functional.mse_loss(model(x), y)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
