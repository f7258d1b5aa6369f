"""An engine's beginning, its loops and counters, and its end, which leaves nothing behind."""

from __future__ import annotations

import ctypes
import gc
import threading

import psutil
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import Dataset

import deepspeed
from tests.parity import Training, assert_close, generator, make_engine, state_of

WIDTH = 12

BF16 = {"bf16": {"enabled": True}}


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 21), nn.Tanh(), nn.Linear(21, 1))


def squared_output(model: nn.Module, index: int, backward) -> None:
    backward(model(torch.randn(3, WIDTH, generator=generator(index))).square().mean())


def live_tensor_bytes() -> int:
    gc.collect()
    # isinstance() would look into lazily imported modules.
    storages = [t.untyped_storage() for t in gc.get_objects() if issubclass(type(t), Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def hooks_of(model: nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")
    of_modules = sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)
    return of_modules + sum(len(p._post_accumulate_grad_hooks or {}) for p in model.parameters())


def resources(model: nn.Module) -> dict[str, int]:
    tensor_bytes = live_tensor_bytes()
    ctypes.CDLL(None).malloc_trim(0)
    process = psutil.Process()
    return {
        "tensor bytes": tensor_bytes,
        "hooks": hooks_of(model),
        "groups": len(dist.distributed_c10d._world.pg_map),
        "python threads": threading.active_count(),
        "threads": process.num_threads(),
        "files": process.num_fds(),
        "resident bytes": process.memory_info().rss,
    }


def cycles(stage: int, config: dict[str, object]) -> tuple[dict[str, int], dict[str, int]]:
    """What the process holds after the first and after ten more engines on one model of 2 MB."""
    model = nn.Sequential(*[nn.Linear(256, 256) for _ in range(8)])
    given = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-5}},
        "scheduler": {"type": "WarmupLR", "params": {}},
        "zero_optimization": {"stage": stage},
        **config,
    }
    first: dict[str, int] = {}
    for _ in range(11):
        engine = deepspeed.initialize(model=model, config=given)[0]
        for index in range(2):
            x = torch.randn(2, 256, generator=generator(index)).to(next(model.parameters()).dtype)
            engine.backward(engine(x).float().square().mean())
            engine.step()
        engine.destroy()
        del engine
        first = first or resources(model)
    return first, resources(model)


@pytest.mark.parametrize(("stage", "config"), [(0, {}), (1, BF16), (2, {}), (3, {}), (3, BF16)])
def test_ten_engines_leave_nothing_behind(ranks, stage, config):
    for first, last in ranks(2, cycles, stage, config):
        for name in ("tensor bytes", "groups", "python threads"):
            assert last[name] == first[name], name
        assert last["hooks"] == 0
        assert last["threads"] <= first["threads"]
        assert last["files"] <= first["files"]
        # Ten times the states of an engine would be 40 MB and more.
        assert last["resident bytes"] - first["resident bytes"] < 5e6


def refusal(call) -> str:
    with pytest.raises(RuntimeError) as caught:
        call()
    return str(caught.value)


def ended() -> dict[str, object]:
    """The model after ``destroy``, which the caller goes on with, and how later calls are taken."""
    engine = make_engine(Training(perceptron, squared_output), 2)
    squared_output(engine, 0, engine.backward)
    weights = state_of(engine.module)
    engine.destroy()
    engine.destroy()
    model = engine.module
    squared_output(model, 0, lambda loss: loss.backward())
    return {
        "same": all(torch.equal(value, weights[name]) for name, value in state_of(model).items()),
        "gradients": all(p.grad is not None for p in model.parameters()),
        "evaluates": engine.eval()(torch.ones(1, WIDTH)).shape,
        "refuses": [refusal(lambda: engine.train()(torch.ones(1, WIDTH))), refusal(engine.step)],
    }


def test_a_destroyed_engine_gives_its_model_back(ranks):
    (found,) = ranks(1, ended)
    refusals = found.pop("refuses")
    assert found == {"same": True, "gradients": True, "evaluates": (1, 1)}
    for call, refusal in zip(("forward", "step"), refusals, strict=True):
        assert f"engine.{call}(): this engine was destroyed" in refusal


class Numbers(Dataset):
    """Sample i is a row of noise and its sum."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(WIDTH, generator=generator(index))
        return x, x.sum()


class Regression(nn.Module):
    """Gives its loss, in the form that it is told."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.layers = perceptron()

    def forward(self, x: Tensor, y: Tensor) -> object:
        loss = (self.layers(x).squeeze(-1) - y).square().mean()
        return {"tensor": loss, "tuple": (loss, None), "dict": {"other": 0, "loss": loss}}[self.form]


def with_train_batch(stage: int, form: str) -> dict[str, object]:
    torch.manual_seed(3)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}},
        "zero_optimization": {"stage": stage},
    }
    engine, _, loader, _ = deepspeed.initialize(model=Regression(form), training_data=Numbers(), config=config)
    rank = engine.communicator.rank
    own = [[torch.stack(column) for column in zip(*[Numbers()[i] for i in batch], strict=True)] for batch in batches(rank)]
    evaluated = engine.eval_batch(iter(own[:2]))
    losses = [engine.train_batch(iter(own[:2])), engine.train_batch(iter(own[2:]))]
    return {
        "evaluated": float(evaluated),
        "losses": [float(loss) for loss in losses],
        "weights": state_of(engine.module),
        "counters": (engine.global_steps, engine.micro_steps, engine.global_samples, engine.skipped_steps),
        "sizes": (len(loader), [tuple(x.shape) for x, _ in loader]),
        "training": engine.module.training,
    }


def batches(rank: int) -> list[list[int]]:
    """The samples of a rank's four micro-batches."""
    return [[8 * (m // 2) % 10 + 4 * rank % 3 + m, (m + rank) % 10] for m in range(4)]


@pytest.mark.parametrize(("stage", "form"), [(0, "tensor"), (1, "tuple"), (2, "dict"), (3, "dict")])
def test_train_batch_and_eval_batch(ranks, stage, form):
    torch.manual_seed(3)
    model = Regression("tensor")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def loss(batch: list[int]) -> Tensor:
        return model(*[torch.stack(column) for column in zip(*[Numbers()[i] for i in batch], strict=True)])

    with torch.no_grad():
        evaluated = [float(loss(batches(rank)[0]) + loss(batches(rank)[1])) / 2 for rank in range(2)]
    losses: list[list[float]] = [[], []]
    for first in (0, 2):
        for rank in range(2):
            both = [loss(batch) for batch in batches(rank)[first : first + 2]]
            (sum(both) / 4).backward()
            losses[rank].append(sum(both).item() / 2)
        optimizer.step()
        optimizer.zero_grad()
    for rank, result in enumerate(ranks(2, with_train_batch, stage, form)):
        assert result["evaluated"] == pytest.approx(evaluated[rank], rel=1e-6)
        assert result["losses"] == pytest.approx(losses[rank], rel=1e-5)
        assert_close(result["weights"], state_of(model))
        assert result["counters"] == (2, 4, 16, 0)
        assert result["sizes"] == (3, [(2, WIDTH), (2, WIDTH), (1, WIDTH)])
        assert result["training"] is True
