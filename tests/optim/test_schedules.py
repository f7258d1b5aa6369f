from __future__ import annotations

import math

import pytest
import torch

from deepspeed.optim import VALID_LR_SCHEDULES, build_scheduler


def optimizer(groups: int = 1, lr: float = 0.5, kind=torch.optim.AdamW):
    return kind([{"params": [torch.zeros(1)]} for _ in range(groups)], lr=lr)


def rates(kind: str, steps: int, **params: object) -> list[float]:
    inner = optimizer()
    schedule = build_scheduler(kind, params, inner)
    seen = []
    for _ in range(steps):
        seen.append(inner.param_groups[0]["lr"])
        assert schedule.get_last_lr() == [seen[-1]]
        schedule.step()
    return seen


def test_the_range_test_rises_linearly_or_in_stairs():
    params = {"lr_range_test_min_lr": 0.1, "lr_range_test_step_size": 2, "lr_range_test_step_rate": 3.0}
    assert rates("LRRangeTest", 5, **params) == pytest.approx([0.1, 0.25, 0.4, 0.55, 0.7])
    stairs = rates("LRRangeTest", 5, **params, lr_range_test_staircase=True)
    assert stairs == pytest.approx([0.1, 0.1, 0.4, 0.4, 0.7])


def test_one_cycle_rises_falls_and_decays():
    seen = rates(
        "OneCycle",
        9,
        cycle_min_lr=1.0,
        cycle_max_lr=3.0,
        cycle_first_step_size=2,
        cycle_second_step_size=4,
        decay_step_size=2,
        decay_lr_rate=1.0,
    )
    assert seen == pytest.approx([1, 2, 3, 2.5, 2, 1.5, 1, 1 / 1.5, 1 / 2])


def test_one_cycle_moves_the_momentum_the_other_way():
    for kind, read in (
        (torch.optim.AdamW, lambda group: group["betas"][0]),
        (torch.optim.SGD, lambda group: group["momentum"]),
    ):
        inner = optimizer(kind=kind)
        params = {"cycle_min_lr": 1, "cycle_max_lr": 2, "cycle_first_step_size": 2}
        schedule = build_scheduler("OneCycle", params, inner)
        seen = []
        for _ in range(5):
            seen.append(read(inner.param_groups[0]))
            schedule.step()
        assert seen == pytest.approx([0.9, 0.85, 0.8, 0.85, 0.9])


def test_warmup_is_linear_or_logarithmic_and_then_constant():
    params = {"warmup_min_lr": 1.0, "warmup_max_lr": 3.0, "warmup_num_steps": 4}
    assert rates("WarmupLR", 6, **params, warmup_type="linear") == pytest.approx([1, 1.5, 2, 2.5, 3, 3])
    expected = [1 + 2 * math.log(1 + i) / math.log(4) for i in range(4)] + [3.0]
    assert rates("WarmupLR", 5, **params) == pytest.approx(expected)


def test_warmup_decay_ends_at_the_minimum():
    params = {"warmup_max_lr": 4.0, "warmup_num_steps": 2, "total_num_steps": 6, "warmup_type": "linear"}
    assert rates("WarmupDecayLR", 8, **params) == pytest.approx([0, 2, 4, 3, 2, 1, 0, 0])


def test_warmup_cosine_scales_the_optimizers_own_rate():
    params = {"warmup_num_steps": 2, "total_num_steps": 6, "warmup_type": "linear", "cos_min_ratio": 0.1}
    cosine = [0.5 * (0.1 + 0.9 * (1 + math.cos(math.pi * i / 4)) / 2) for i in range(5)]
    assert rates("WarmupCosineLR", 8, **params) == pytest.approx([0, 0.25, *cosine, 0.05])


PARAMS = {
    "LRRangeTest": {},
    "OneCycle": {"cycle_min_lr": 0.1, "cycle_max_lr": 0.2, "cycle_first_step_size": 3},
    "WarmupLR": {"warmup_num_steps": 5},
    "WarmupDecayLR": {"warmup_num_steps": 5, "total_num_steps": 9},
    "WarmupCosineLR": {"warmup_num_steps": 5, "total_num_steps": 9},
}


@pytest.mark.parametrize("kind", VALID_LR_SCHEDULES)
def test_a_schedule_resumes_exactly(kind):
    first = build_scheduler(kind, PARAMS[kind], optimizer())
    for _ in range(4):
        first.step()
    second = build_scheduler(kind, PARAMS[kind], optimizer())
    second.load_state_dict(first.state_dict())
    for _ in range(4):
        assert second.get_last_lr() == first.get_last_lr()
        assert second.optimizer.param_groups[0]["lr"] == first.get_last_lr()[0]
        first.step()
        second.step()


def test_each_group_may_have_its_own_rate():
    params = {"warmup_max_lr": [1.0, 2.0], "warmup_num_steps": 1, "warmup_type": "linear"}
    schedule = build_scheduler("warmuplr", params, optimizer(2))
    schedule.step()
    assert schedule.get_last_lr() == [1.0, 2.0]
    with pytest.raises(ValueError, match="warmup_max_lr has 2 values, the optimizer 3"):
        build_scheduler("WarmupLR", params, optimizer(3))


@pytest.mark.parametrize(
    ("kind", "params", "message"),
    [
        ("WarmUpDecay", {}, "Did you mean 'WarmupDecayLR'"),
        ("WarmupLR", {"warmup_steps": 1}, "Did you mean 'warmup_num_steps'"),
        ("WarmupDecayLR", {}, "lacks total_num_steps"),
        ("WarmupLR", {"warmup_max_lr": "auto"}, "still 'auto'"),
        ("WarmupLR", {"warmup_type": "cubic"}, "'log' or 'linear'"),
    ],
)
def test_errors_name_the_key_and_the_remedy(kind, params, message):
    with pytest.raises(ValueError, match=message):
        build_scheduler(kind, params, optimizer())
