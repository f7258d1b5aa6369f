"""Ways in which gradients come about, each to the numbers of plain PyTorch."""

from __future__ import annotations

import shutil
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.parity import (
    Result,
    Training,
    assert_close,
    assert_parity,
    generator,
    make_engine,
    seeded_model,
    sgd,
    state_of,
    train_plain,
)

WIDTH = 10


def inputs(index: int) -> Tensor:
    return torch.randn(3, WIDTH, generator=generator(index))


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 21), nn.Tanh(), nn.Linear(21, WIDTH), nn.LayerNorm(WIDTH))


def squared_output(model: nn.Module, index: int, backward) -> None:
    backward(model(inputs(index)).square().mean())


def forwards_before_one_backward(model: nn.Module, index: int, backward) -> None:
    outputs = [model(inputs(3 * index + i)) for i in range(3)]
    backward((outputs[0] * outputs[1]).mean() + outputs[2].square().mean())


def losses_of_one_graph(model: nn.Module, index: int, backward) -> None:
    output = model(inputs(index))
    backward(output.square().mean(), retain_graph=True)
    backward(output.abs().mean())


def losses_of_several_graphs(model: nn.Module, index: int, backward) -> None:
    for i in range(3):
        backward(model(inputs(3 * index + i)).square().mean())


def losses_of_parts(model: nn.Module, index: int, backward) -> None:
    """The first loss reaches the first layer alone, the second all."""
    hidden = model.get_submodule("0" if isinstance(model, nn.Sequential) else "module.0")(inputs(index))
    backward(hidden.square().mean())
    squared_output(model, index, backward)


@pytest.mark.parametrize(
    "micro_step", [forwards_before_one_backward, losses_of_one_graph, losses_of_several_graphs, losses_of_parts]
)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_several_forwards_and_losses_in_one_micro_step(ranks, micro_step, accumulation):
    training = Training(perceptron, micro_step, accumulation=accumulation, config={"gradient_clipping": 0.05})
    assert_parity(ranks, training)


class Checkpointed(nn.Module):
    """Blocks whose activations are recomputed; the first is used twice, in two checkpoints."""

    def __init__(self, use_reentrant: bool | None) -> None:
        super().__init__()
        self.use_reentrant = use_reentrant
        self.enter = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for index in (0, 1, 2, 0):
            block = self.blocks[index]
            x = block(x) if self.use_reentrant is None else checkpoint(block, x, use_reentrant=self.use_reentrant)
        return x


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("bucket", [0, 200, 10_000])
def test_activation_checkpointing(ranks, use_reentrant, accumulation, bucket):
    config = {"zero_optimization": {"reduce_bucket_size": bucket}}
    training = Training(partial(Checkpointed, use_reentrant), squared_output, accumulation=accumulation, config=config)
    plain = Training(partial(Checkpointed, None), squared_output, accumulation=accumulation)
    # Re-entrant, the shared block's gradients come twice; whether both come before its bucket is reduced depends on
    # the bucket, and with it the order of the sums.
    assert_parity(ranks, training, plain=plain, same_bits=(1, 2) if use_reentrant else (1, 2, 3))


def without_synchronization(training: Training, stage: int) -> Result:
    engine = make_engine(training, stage)
    rank, size = engine.communicator.rank, engine.communicator.size
    norms, elements = [], []
    for step in range(training.steps):
        first = step * 3 * size + rank
        engine.communicator.log.clear()
        with engine.no_sync():
            for micro in range(2):
                training.micro_step(engine, first + micro * size, lambda loss: engine.backward(loss / 3))
        elements.append(engine.communicator.log.total("reduce_scatter", "all_reduce").count)
        training.micro_step(engine, first + 2 * size, lambda loss: engine.backward(loss / 3))
        engine.step()
        norms.append(engine.get_global_grad_norm())
    assert elements == [0] * training.steps, "no_sync reduces nothing"
    return Result(state_of(engine.module), norms)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_no_sync_accumulates_on_each_rank_and_reduces_once(ranks, stage):
    expected = train_plain(Training(perceptron, squared_output, accumulation=3), 2)
    for result in ranks(2, without_synchronization, Training(perceptron, squared_output), stage):
        assert_close(result.weights, expected.weights)
        assert result.norms == pytest.approx(expected.norms, rel=1e-5)


def with_boundaries_by_hand(stage: int, accumulation: int) -> dict[str, Tensor]:
    """Steps after 1, 2 and 3 micro-batches."""
    engine = make_engine(Training(perceptron, squared_output, accumulation=accumulation), stage)
    rank, size, index = engine.communicator.rank, engine.communicator.size, 0
    for micros in (1, 2, 3):
        for micro in range(micros):
            engine.set_gradient_accumulation_boundary(micro == micros - 1)
            loss = engine(inputs(index * size + rank)).square().mean() / micros
            engine.backward(loss, scale_wrt_gas=False)
            engine.step()
            index += 1
    assert (engine.global_steps, engine.micro_steps) == (3, 6)
    return state_of(engine.module)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_boundaries_set_by_hand(ranks, stage, accumulation):
    model = seeded_model(Training(perceptron, squared_output))
    optimizer, index = sgd(model.parameters()), 0
    for micros in (1, 2, 3):
        for _ in range(2 * micros):
            (model(inputs(index)).square().mean() / (2 * micros)).backward()
            index += 1
        optimizer.step()
        optimizer.zero_grad()
    for weights in ranks(2, with_boundaries_by_hand, stage, accumulation):
        assert_close(weights, state_of(model))


def with_backward_of_the_loss_itself(training: Training, stage: int) -> dict[str, Tensor]:
    engine = make_engine(training, stage)
    rank, size, micros = engine.communicator.rank, engine.communicator.size, training.accumulation
    for index in range(training.steps * micros):
        engine.scale(engine(inputs(index * size + rank)).square().mean() / micros).backward()
        engine.step()
    return state_of(engine.module)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_backward_called_on_the_scaled_loss_in_place_of_the_engines(ranks, stage, accumulation):
    training = Training(perceptron, squared_output, accumulation=accumulation)
    expected = train_plain(training, 2)
    for weights in ranks(2, with_backward_of_the_loss_itself, training, stage):
        assert_close(weights, expected.weights)


def forgetting_gradients(stage: int) -> dict[str, Tensor]:
    engine = make_engine(Training(perceptron, squared_output), stage)
    for index in range(3):
        engine.backward(engine(inputs(100 + index)).sum())
        engine.zero_grad()
        squared_output(engine, index, engine.backward)
        engine.step()
    return state_of(engine.module)


def test_zero_grad_forgets_what_backward_left(ranks):
    expected = train_plain(Training(perceptron, squared_output), 1)
    for stage in (0, 1, 2, 3):
        assert_close(ranks(1, forgetting_gradients, stage)[0], expected.weights)


def generator_network() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Linear(9, WIDTH))


def discriminator_network() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 9), nn.Tanh(), nn.Linear(9, 1))


NETWORKS = [Training(generator_network, squared_output), Training(discriminator_network, squared_output)]


def adversarial_loss(networks, index: int, of: int) -> Tensor:
    """The loss of the generator (``of`` 0), which goes through the discriminator, or of the discriminator (1)."""
    generate, discriminate = networks
    noise = torch.randn(3, 4, generator=generator(index))
    if of == 0:
        return nn.functional.softplus(-discriminate(generate(noise))).mean()
    fake, real = discriminate(generate(noise).detach()), discriminate(inputs(index))
    return nn.functional.softplus(fake).mean() + nn.functional.softplus(-real).mean()


def two_engines(stages: tuple[int, int]) -> list[dict[str, Tensor]]:
    engines = [make_engine(network, stage) for network, stage in zip(NETWORKS, stages, strict=True)]
    rank, size = engines[0].communicator.rank, engines[0].communicator.size
    for step in range(3):
        for which in (1, 0):
            engines[which].zero_grad()
            engines[which].backward(adversarial_loss(engines, step * size + rank, which))
            engines[which].step()
    return [state_of(engine.module) for engine in engines]


@pytest.mark.parametrize("stages", [(0, 0), (1, 2), (2, 1), (2, 2), (3, 3), (3, 0)])
def test_two_engines_train_in_turn_on_each_others_outputs(ranks, stages):
    models = [seeded_model(network) for network in NETWORKS]
    optimizers = [sgd(model.parameters()) for model in models]
    for step in range(3):
        for which in (1, 0):
            optimizers[which].zero_grad()
            for rank in range(2):
                (adversarial_loss(models, step * 2 + rank, which) / 2).backward()
            optimizers[which].step()
    for results in ranks(2, two_engines, stages):
        for weights, model in zip(results, models, strict=True):
            assert_close(weights, state_of(model))


def compiled(training: Training, stage: int, backend: str) -> dict[str, Tensor]:
    engine = make_engine(training, stage)
    engine.compile(backend=backend)
    rank, size = engine.communicator.rank, engine.communicator.size
    for step in range(training.steps):
        training.micro_step(engine, step * size + rank, engine.backward)
        engine.step()
    weights = state_of(engine.module)
    torch.compiler.reset()
    return weights


NO_COMPILER = "inductor writes C++ and finds no compiler: install g++ or clang++"
INDUCTOR = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason=NO_COMPILER)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=INDUCTOR)])
def test_a_compiled_model(ranks, backend):
    training = Training(perceptron, squared_output)
    expected = train_plain(training, 2)
    for stage in (0, 2):
        for weights in ranks(2, compiled, training, stage, backend):
            assert_close(weights, expected.weights)
