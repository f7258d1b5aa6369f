from __future__ import annotations

import pytest
from torch import nn

from deepspeed.memory.estimate import (
    estimate_zero2_model_states_mem_needs,
    estimate_zero3_model_states_mem_needs,
    model_state_bytes,
)
from deepspeed.memory.estimate_report import (
    count_parameters,
    estimate_zero2_model_states_mem_needs_all_cold,
    estimate_zero2_model_states_mem_needs_all_live,
    estimate_zero3_model_states_mem_needs_all_cold,
    estimate_zero3_model_states_mem_needs_all_live,
)


@pytest.mark.parametrize(("stage", "gigabytes"), [(0, 120), (1, 31.4), (2, 16.6), (3, 1.9)])
def test_model_states_are_those_of_the_zero_paper(stage: int, gigabytes: float) -> None:
    states = model_state_bytes(7_500_000_000, stage=stage, world_size=64, dtype_bytes=2)
    assert states.total / 1e9 == pytest.approx(gigabytes, abs=0.05)


def test_fp32_training_has_no_master_copy() -> None:
    states = model_state_bytes(100, stage=0, world_size=4, dtype_bytes=4, optimizer_states=1)
    assert (states.parameters, states.gradients, states.master, states.optimizer) == (400, 400, 0, 400)


def test_the_stage_2_table_is_that_of_the_documentation(capsys: pytest.CaptureFixture[str]) -> None:
    estimate_zero2_model_states_mem_needs_all_cold(total_params=2851e6, num_gpus_per_node=8, num_nodes=1)
    assert [line.rstrip() for line in capsys.readouterr().out.splitlines()] == [
        "Estimated memory needed for params, optim states and gradients for a:",
        "HW: Setup with 1 node, 8 GPUs per node.",
        "SW: Model with 2851M total params.",
        "  per CPU  |  per GPU |   Options",
        "   127.45GB |   5.31GB | offload_optimizer=cpu",
        "   127.45GB |  15.93GB | offload_optimizer=none",
    ]


def test_the_stage_3_table_is_that_of_the_documentation(capsys: pytest.CaptureFixture[str]) -> None:
    estimate_zero3_model_states_mem_needs_all_cold(2851e6, 32e6, num_gpus_per_node=8, num_nodes=1)
    output = capsys.readouterr().out
    assert "SW: Model with 2851M total params, 32M largest layer params." in output
    rows = [[part.strip() for part in line.split("|")] for line in output.splitlines()[4:]]
    assert [row[:2] for row in rows] == [
        ["71.69GB", "0.12GB"],
        ["127.45GB", "0.12GB"],
        ["63.72GB", "0.78GB"],
        ["127.45GB", "0.78GB"],
        ["1.43GB", "6.09GB"],
        ["127.45GB", "6.09GB"],
    ]
    assert rows[0][2] == "offload_param=cpu , offload_optimizer=cpu , zero_init=1"
    assert rows[-1][2] == "offload_param=none, offload_optimizer=none, zero_init=0"


def test_the_figures_of_the_live_t5_3b_follow_from_its_counts() -> None:
    total, largest = 2_851_598_336, 32_899_072
    gpu = [estimate_zero3_model_states_mem_needs(total, largest, 8, 1, *offload)[1] / 2**30 for offload in
           ((False, False), (True, False), (True, True))]  # fmt: skip
    assert [round(value, 2) for value in gpu] == [6.1, 0.79, 0.12]


def test_more_machines_shrink_what_is_sharded_and_nothing_else() -> None:
    assert estimate_zero2_model_states_mem_needs(1000, 2, 4, cpu_offload=False) == (12000, 4000 + 2000)
    assert estimate_zero2_model_states_mem_needs(1000, 2, 4) == (24000, 2000)
    assert estimate_zero3_model_states_mem_needs(1000, 10, 2, 4, additional_buffer_factor=1) == (4500, 40, 40)


def test_impossible_requests_name_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="num_nodes must be at least 1, got 0"):
        estimate_zero2_model_states_mem_needs(1000, num_nodes=0)
    with pytest.raises(ValueError, match="needs cpu_offload=True"):
        estimate_zero3_model_states_mem_needs(1000, 10, cpu_offload=False)


def test_a_live_model_counts_tied_parameters_once_and_prints_the_cold_table(
    capsys: pytest.CaptureFixture[str],
) -> None:
    embedding, head = nn.Embedding(50, 8), nn.Linear(8, 50, bias=False)
    head.weight = embedding.weight
    model = nn.Sequential(embedding, nn.Linear(8, 8), head)
    assert count_parameters(model) == (50 * 8 + 8 * 8 + 8, 50 * 8)
    for live, cold in (
        (lambda: estimate_zero2_model_states_mem_needs_all_live(model, 2),
         lambda: estimate_zero2_model_states_mem_needs_all_cold(472, 2)),
        (lambda: estimate_zero3_model_states_mem_needs_all_live(model, 2),
         lambda: estimate_zero3_model_states_mem_needs_all_cold(472, 400, 2)),
    ):  # fmt: skip
        live()
        printed = capsys.readouterr().out
        cold()
        assert printed == capsys.readouterr().out
