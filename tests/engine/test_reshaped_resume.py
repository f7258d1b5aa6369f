"""One training in three parts, each on other ranks, at another stage and tier: its losses lie on those of one run."""

from __future__ import annotations

from typing import Any

import torch

from tests.engine.test_checkpointing import ADAM, SCHEDULE, WIDTH, Model, squared_output
from tests.parity import Training, generator, make_engine

STEPS = 4
"""Of each part."""


def losses(first: int, last: int, stage: int, tier: str | None, load: str | None, save: str | None) -> list[float]:
    """The loss of each step over all ranks' samples."""
    zero: dict[str, Any] = {"offload_optimizer": {"device": "nvme", "nvme_path": tier}} if tier else {}
    engine = make_engine(Training(Model, squared_output, config={**ADAM, **SCHEDULE, "zero_optimization": zero}), stage)
    if load:
        engine.load_checkpoint(load)
    found = []
    communicator = engine.communicator
    for step in range(first, last):
        x = torch.randn(8, WIDTH, generator=generator(step % 3)).chunk(communicator.size)[communicator.rank]
        loss = engine(x).square().mean()
        engine.backward(loss)
        engine.step()
        found.append(float(communicator.sum_in_rank_order(loss.detach()[None].clone())) / communicator.size)
    if save:
        engine.save_checkpoint(save)
    engine.destroy()
    return found


def test_losses_through_four_one_and_two_ranks_and_stages_one_three_and_two_are_those_of_one_run(ranks, tmp_path):
    expected = ranks(2, losses, 0, 3 * STEPS, 0, None, None, None)[0]
    folders = [str(tmp_path / name) for name in ("first", "second")]
    found = ranks(4, losses, 0, STEPS, 1, None, None, folders[0])[0]
    found += ranks(1, losses, STEPS, 2 * STEPS, 3, str(tmp_path), folders[0], folders[1])[0]
    found += ranks(2, losses, 2 * STEPS, 3 * STEPS, 2, None, folders[1], None)[0]
    assert expected[-1] < 0.5 * expected[0]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-5, atol=0)
    print("\n", " ".join(f"{loss:.6f}" for loss in expected), "\n", " ".join(f"{loss:.6f}" for loss in found))
