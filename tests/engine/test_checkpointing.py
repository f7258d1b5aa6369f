"""Checkpoints of an engine: resumed anywhere, refused whole where damaged, intact whatever happens to a save."""

from __future__ import annotations

import json
import os
import resource
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from deepspeed.checkpoint.directory import index_checksum
from tests.parity import Training, assert_close, assert_equal, generator, make_engine, state_of

WIDTH = 12


class Model(nn.Module):
    """Trained, tied and frozen parameters and a buffer."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.first = nn.Linear(WIDTH, width)
        self.last = nn.Linear(width, WIDTH)
        self.again = self.first
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.again(self.frozen(x))))


def wider() -> nn.Module:
    return Model(WIDTH + 1)


def squared_output(model: nn.Module, index: int, backward) -> None:
    backward(model(torch.randn(4, WIDTH, generator=generator(index))).square().mean())


ADAM = {"optimizer": {"type": "AdamW", "params": {"lr": 0.01}}}
SCHEDULE = {"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 0.01, "warmup_num_steps": 6}}}
TRAINING = Training(Model, squared_output, config={**ADAM, **SCHEDULE})
CLIENT = {"epoch": 7, "pair": (1, [2.5, None]), "by number": {3: "three"}, "random": torch.arange(5), "flags": {True}}


def train(engine, first: int, last: int) -> None:
    """The same eight samples in each step, whatever the number of ranks."""
    rank, size = engine.communicator.rank, engine.communicator.size
    for step in range(first, last):
        x = torch.randn(8, WIDTH, generator=generator(step)).chunk(size)[rank]
        engine.backward(engine(x).square().mean())
        engine.step()


def saved(directory: str, stage: int) -> dict[str, Tensor]:
    engine = make_engine(TRAINING, stage)
    engine.module.seen.fill_(5)
    train(engine, 0, 2)
    engine.save_checkpoint(directory, client_state=CLIENT)
    train(engine, 2, 4)
    return state_of(engine.module)


def resumed(directory: str) -> list[tuple[dict[str, Tensor], object, tuple[int, int]]]:
    results = []
    for stage in (0, 1, 2, 3):
        engine = make_engine(TRAINING, stage)
        train(engine, 10, 11)
        path, client_state = engine.load_checkpoint(directory)
        assert path == str(Path(directory) / "global_step2")
        train(engine, 2, 4)
        results.append((state_of(engine.module), client_state, (engine.global_steps, engine.micro_steps)))
        engine.destroy()
    return results


@pytest.mark.parametrize(("size", "stage"), [(2, 2), (2, 0), (4, 1), (2, 3), (4, 3)])
def test_training_goes_on_with_the_same_numbers_at_any_world_size_and_stage(ranks, tmp_path, size, stage):
    expected = ranks(size, saved, str(tmp_path), stage)[0]
    for other in (1, 2, 4):
        for results in ranks(other, resumed, str(tmp_path)):
            for weights, client_state, counters in results:
                assert_close(weights, expected, 1e-5)
                assert counters == (4, 4)
                assert torch.equal(client_state.pop("random"), CLIENT["random"])
                assert client_state == {key: value for key, value in CLIENT.items() if key != "random"}


def refused(directory: str, training: Training) -> tuple[str, bool, bool]:
    engine = make_engine(training, 2)
    train(engine, 0, 1)
    before = state_of(engine.module), engine.optimizer.state_dict(), vars(engine.counters).copy()
    with pytest.raises(RuntimeError) as caught:
        engine.load_checkpoint(directory)
    after = state_of(engine.module), engine.optimizer.state_dict(), vars(engine.counters)
    weights = all(torch.equal(value, before[0][name]) for name, value in after[0].items())
    masters = zip(after[1]["fp32_flat_groups"], before[1]["fp32_flat_groups"], strict=True)
    return str(caught.value), weights and all(torch.equal(a, b) for a, b in masters), after[2] == before[2]


def truncate(path: Path) -> None:
    file = path / "rank_00001.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def remove_a_file(path: Path) -> None:
    (path / "rank_00001.safetensors").unlink()


def flip_a_bit(path: Path) -> None:
    file = path / "rank_00000.safetensors"
    content = bytearray(file.read_bytes())
    values = 8 + int.from_bytes(content[:8], "little")
    content[values + 10] ^= 1
    file.write_bytes(content)


def forget_a_rank(path: Path) -> None:
    index = json.loads((path / "index.json").read_text())
    index["ranks"] = 1
    (path / "index.json").write_text(json.dumps({**index, "checksum": index_checksum(index)}))


def change_the_index(path: Path) -> None:
    index = json.loads((path / "index.json").read_text())
    index["counters"]["global_steps"] += 1
    (path / "index.json").write_text(json.dumps(index))


def make_foreign(path: Path) -> None:
    for file in path.iterdir():
        file.unlink()
    (path / "weights.npz").write_bytes(b"")


def leave_alone(path: Path) -> None:
    pass


SGD = Training(Model, squared_output)
WIDER = Training(wider, squared_output, config=ADAM)


@pytest.mark.parametrize(
    ("damage", "training", "message"),
    [
        (truncate, TRAINING, "rank_00001.safetensors is missing or damaged"),
        (remove_a_file, TRAINING, "rank_00001.safetensors is missing or damaged"),
        (flip_a_bit, TRAINING, "the checksum of"),
        (forget_a_rank, TRAINING, "it lacks the elements"),
        (change_the_index, TRAINING, "index.json is damaged: its checksum is not that of its content"),
        (make_foreign, TRAINING, "holds weights.npz"),
        (leave_alone, WIDER, "first.weight has shape (12, 12) there and (13, 12) here"),
        (leave_alone, SGD, "its optimizer is Adam and this engine's SGD"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_named_and_the_engine_stays_as_it_was(ranks, tmp_path, damage, training, message):
    ranks(2, saved, str(tmp_path), 2)
    damage(tmp_path / "global_step2")
    for said, weights, counters in ranks(2, refused, str(tmp_path), training):
        assert message in said
        assert weights and counters


def save_on_a_full_disk(directory: str) -> str:
    """Rank 1 can write 100 bytes to a file and no more."""
    engine = make_engine(TRAINING, 2)
    train(engine, 0, 1)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if engine.communicator.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(RuntimeError) as caught:
            engine.save_checkpoint(directory, tag="global_step2")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    return str(caught.value)


def test_a_full_disk_is_said_on_every_rank_and_leaves_the_old_checkpoint(ranks, tmp_path):
    expected = ranks(2, saved, str(tmp_path), 2)[0]
    for message in ranks(2, save_on_a_full_disk, str(tmp_path)):
        assert "failed on rank 1" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["global_step2", "latest", "zero_to_fp32.py"]
    assert_close(ranks(2, resumed, str(tmp_path))[0][0][0], expected, 1e-5)


def killed_at_each_moment(directory: str) -> tuple[int, list[dict[str, Tensor]]]:
    """A process forked for each save dies at the n-th fsync or rename; what loads after each."""
    engine = make_engine(TRAINING, 1)
    train(engine, 0, 1)
    engine.save_checkpoint(directory, tag="kept")
    loaded: list[dict[str, Tensor]] = []
    for moment in range(1, 50):
        child = os.fork()
        if child == 0:
            left = [moment]
            for owner, name in ((os, "fsync"), (Path, "rename")):
                setattr(owner, name, dying(getattr(owner, name), left))
            engine.save_checkpoint(directory, tag="kept")
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        train(engine, 5, 6)
        engine.load_checkpoint(directory)
        loaded.append(state_of(engine.module))
        if status == 0:
            return moment, loaded
    raise AssertionError("the save does not end")


def dying(function, left: list[int]):
    def call(*args):
        left[0] -= 1
        if left[0] == 0:
            os._exit(9)
        return function(*args)

    return call


def test_a_save_killed_at_any_moment_leaves_a_checkpoint_that_loads(ranks, tmp_path):
    moments, loaded = ranks(1, killed_at_each_moment, str(tmp_path))[0]
    assert moments > 6
    for weights in loaded:
        assert_equal(weights, loaded[0])


def with_an_unsaveable_state(directory: str) -> str:
    engine = make_engine(TRAINING, 2)
    with pytest.raises(RuntimeError) as caught:
        engine.save_checkpoint(directory, client_state={"deep": {"thing": object()}})
    return str(caught.value)


def test_a_client_state_that_cannot_be_saved_is_named(ranks, tmp_path):
    for message in ranks(2, with_an_unsaveable_state, str(tmp_path)):
        assert "client_state['deep']['thing'] is a object" in message
    assert not list(tmp_path.iterdir())
