from __future__ import annotations

import pytest
import torch

from deepspeed.optim import Adam, build_optimizer


def groups():
    return [{"params": [torch.zeros(2)], "weight_decay": 0.5}, {"params": [torch.zeros(2)]}]


def test_a_groups_own_options_override_the_configured_ones():
    optimizer = build_optimizer("ADAMW", {"lr": "3e-4", "weight_decay": 0.1, "betas": [0.8, 0.9]}, groups())
    assert isinstance(optimizer, Adam)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.1]
    assert optimizer.param_groups[0]["lr"] == 3e-4
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.9)


@pytest.mark.parametrize(("mode", "kind"), [(True, torch.optim.AdamW), (False, torch.optim.Adam)])
def test_torch_adam_is_torchs_own(mode, kind):
    assert type(build_optimizer("Adam", {"torch_adam": True, "adam_w_mode": mode}, groups())) is kind


@pytest.mark.parametrize(
    ("kind", "params", "message"),
    [
        ("AdamV", {}, "Did you mean 'Adam"),
        ("Adam", {"weight_decy": 0.1}, "Did you mean 'weight_decay'"),
        ("Adam", {"amsgrad": True}, "amsgrad"),
        ("Adam", {"lr": "auto"}, "still 'auto'"),
        ("Lamb", {"max_grad_norm": 1.0}, "gradient_clipping"),
        ("Adam", {"betas": [0.9, 1.5]}, "betas"),
    ],
)
def test_errors_name_the_key_and_the_remedy(kind, params, message):
    with pytest.raises(ValueError, match=message):
        build_optimizer(kind, params, groups())


@pytest.mark.parametrize(("kind", "decay", "decoupled"), [("Adam", 0.0, False), ("AdamW", 0.01, True)])
def test_adamw_is_always_decoupled_and_decays_by_default(kind, decay, decoupled):
    group = build_optimizer(kind, {"adam_w_mode": False}, [{"params": [torch.zeros(2)]}]).param_groups[0]
    assert (group["weight_decay"], group["adam_w_mode"]) == (decay, decoupled)
