from __future__ import annotations

import argparse

import pytest

from deepspeed.launcher import program
from deepspeed.launcher.arguments import add_program_arguments
from deepspeed.launcher.errors import LaunchError
from deepspeed.launcher.program import Program, rank_commands
from deepspeed.launcher.resources import parse_range_list
from deepspeed.launcher.world import Node, World


@pytest.mark.parametrize(
    "original",
    [
        Program("script", "train.py", ("--module", "-x", "--", "a b")),
        Program("module", "package.train", (), local_rank_argument=False, bind_cores=True),
        Program("program", "./run", ("1",), local_rank_argument=False),
        Program("script", "t.py", (), bind_cores=True, core_list="0-3,8", log_folder="logs", grace_seconds=2.5),
    ],
)
def test_another_nodes_entry_makes_the_same_program_of_its_arguments(original):
    parser = argparse.ArgumentParser()
    add_program_arguments(parser)
    assert Program.from_options(parser.parse_args(original.to_arguments())) == original


def test_core_lists_are_numbers_and_ranges():
    assert parse_range_list("1,3-5,7") == [1, 3, 4, 5, 7]
    for wrong in ("", "1,", "5-3", "a", "1,1", "0-2,2"):
        with pytest.raises(LaunchError, match="core list"):
            parse_range_list(wrong)


def test_ranks_are_pinned_to_shares_of_the_listed_cores(monkeypatch):
    monkeypatch.setattr(program, "available_cores", lambda: list(range(8)))
    node = Node(World({"a": [0, 1]}, "a", 1), 0, accelerators=False)
    bound = Program("module", "m", (), bind_cores=True, core_list="2-5")
    commands = rank_commands(bound, node, {})
    assert [command.arguments[4] for command in commands] == ["2,3", "4,5"]
    with pytest.raises(LaunchError, match=r"--bind_core_list 6-9: a offers no core 8, 9; available: 0, 1"):
        rank_commands(Program("module", "m", (), bind_cores=True, core_list="6-9"), node, {})


def test_a_missing_script_is_an_error_with_the_path():
    node = Node(World({"a": [0]}, "a", 1), 0, accelerators=False)
    with pytest.raises(LaunchError, match=r"the script nowhere\.py does not exist"):
        rank_commands(Program("script", "nowhere.py"), node, {})
