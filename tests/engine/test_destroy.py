"""What a destroyed engine of stage 3 leaves: a model in shards, as zero.Init does."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deepspeed
from deepspeed.zero.released import ReleasedParameter
from tests.parity import assert_close, assert_equal, generator, sgd, state_of

WIDTH = 64
LARGE = WIDTH * WIDTH


class Model(nn.Module):
    """A frozen layer, a tied weight, biases that stay whole."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(6))
        self.layers[3].weight = self.layers[0].weight
        self.layers[1].requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def config(stage: int, **more: Any) -> dict[str, Any]:
    zero = {"stage": stage, "stage3_param_persistence_threshold": WIDTH, "reduce_bucket_size": 5000}
    return {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero, **more}


def model() -> Model:
    torch.manual_seed(3)
    return Model()


def train(model: nn.Module, stage: int, steps: range, **more: Any) -> dict[str, Tensor]:
    """Train with a new engine, and destroy it; returns the weights before that."""
    engine = deepspeed.initialize(model=model, optimizer=sgd(model.parameters()), config=config(stage, **more))[0]
    for step in steps:
        x = torch.randn(3, WIDTH, generator=generator(step)).to(next(model.parameters()).dtype)
        engine.backward(engine(x).float().square().mean())
        engine.step()
    before = state_of(model)
    engine.destroy()
    engine.destroy()
    return before


def live_numel() -> int:
    gc.collect()
    tensors = [t for t in gc.get_objects() if issubclass(type(t), Tensor) and t.dtype == torch.bfloat16]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values()) // 2


def left() -> dict[str, Any]:
    start = live_numel()
    made = model()
    before = train(made, 3, range(2), bf16={"enabled": True})
    rest = live_numel() - start
    released = {name for name, p in made.named_parameters() if type(p) is ReleasedParameter}
    same = all(torch.equal(value, before[name]) for name, value in state_of(made).items())
    with deepspeed.zero.GatheredParameters(made.layers[0].weight, modifier_rank=1):
        made.layers[0].weight.data.fill_(deepspeed.comm.get_rank())
    with pytest.raises(RuntimeError, match=r"'layers.0.weight' \(64, 64\) is sharded by ZeRO stage 3"):
        made(torch.randn(1, WIDTH).bfloat16())
    return {
        "numel": rest - sum(value.numel() for value in before.values()),
        "released": released,
        "same": same,
        "shape": made.layers[2].weight.shape,
        "written": state_of(made)["layers.3.weight"].unique().tolist(),
        "tied": made.layers[3].weight is made.layers[0].weight,
    }


def test_parameters_stay_in_shards_that_can_be_gathered_and_written(ranks):
    for found in ranks(2, left):
        # Half of the five weights, and the six biases, whole.
        assert found.pop("numel") <= 5 * LARGE / 2 + 6 * WIDTH + 200
        assert found.pop("released") == {f"layers.{i}.weight" for i in (0, 1, 2, 4, 5)}
        assert found == {"same": True, "shape": (WIDTH, WIDTH), "written": [1.0], "tied": True}


def again(first: int, second: int) -> list[dict[str, Tensor]]:
    made = model()
    return [train(made, first, range(2)), train(made, second, range(2, 4)), state_of(made)]


@pytest.mark.parametrize(("first", "second"), [(3, 3), (3, 0), (3, 2), (1, 3)])
def test_another_engine_of_any_stage_goes_on_with_what_is_left(ranks, first, second):
    plain = model()
    expected = []
    for steps in (range(2), range(2, 4)):
        optimizer = sgd([p for p in plain.parameters() if p.requires_grad])
        for step in steps:
            plain(torch.randn(3, WIDTH, generator=generator(step))).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        expected.append({name: value.detach().clone() for name, value in plain.state_dict().items()})
    for results in ranks(2, again, first, second):
        assert_close(results[0], expected[0])
        assert_close(results[1], expected[1])
        assert_equal(results[2], results[1])


def constructed_frozen(stage: int, threshold: int) -> list[dict[str, Tensor]]:
    with deepspeed.zero.Init(config_dict_or_path=config(3)):
        made = model()
    given = config(stage)
    given["zero_optimization"]["stage3_param_persistence_threshold"] = threshold
    before = state_of(made)
    engine = deepspeed.initialize(model=made, config=given)[0]
    output = engine(torch.ones(1, WIDTH))
    after = state_of(made)
    engine.destroy()
    return [before, after, {"output": output.detach()}]


@pytest.mark.parametrize(("stage", "threshold"), [(0, 0), (2, 0), (3, 0), (3, 10**6)])
def test_what_is_not_trained_is_whole_where_the_engine_shards_it_not(ranks, stage, threshold):
    output = {"output": model()(torch.ones(1, WIDTH)).detach()}
    expected = {name: value.detach() for name, value in model().state_dict().items()}
    for before, after, found in ranks(2, constructed_frozen, stage, threshold):
        assert_equal(before, expected)
        assert_equal(after, expected)
        assert_close(found, output)
