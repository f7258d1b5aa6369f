from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from deepspeed.launcher.environment import allocator_settings, parse_assignment, read_environment_files, visible_devices
from deepspeed.launcher.errors import LaunchError
from deepspeed.launcher.resources import core_shares


def test_the_current_folders_environment_file_wins_over_the_home_folders(tmp_path):
    home, here = tmp_path / "home", tmp_path / "here"
    for folder, text in ((home, "A=1\nB=1\n"), (here, "# a comment\n\nB=2=3\n")):
        folder.mkdir()
        (folder / ".deepspeed_env").write_text(text)
    assert read_environment_files(".deepspeed_env", (home, here)) == {"A": "1", "B": "2=3"}


def test_a_malformed_line_is_named_with_its_file_and_number(tmp_path):
    (tmp_path / ".deepspeed_env").write_text("A=1\nnonsense\n")
    with pytest.raises(LaunchError, match=r"\.deepspeed_env, line 2: 'nonsense'"):
        read_environment_files(".deepspeed_env", (tmp_path,))


def test_an_assignment_without_a_name_is_refused():
    with pytest.raises(LaunchError, match="--env"):
        parse_assignment("=1", "--env")


def test_ranks_share_the_cores_without_overlap_and_take_turns_when_there_are_too_few():
    assert core_shares([0, 1, 2, 3, 4], 2) == [[0, 1], [2, 3]]
    assert core_shares([4, 7], 3) == [[4], [7], [4]]


def test_slots_count_among_the_devices_that_are_already_visible():
    assert visible_devices([0, 2], None) == "0,2"
    assert visible_devices([0, 2], "3,5,7") == "3,7"


def test_a_users_own_allocator_tunable_is_left_alone():
    assert allocator_settings({"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=1"}) == {"THP_MEM_ALLOC_ENABLE": "1"}


ALIGNMENTS = """
import torch
print([torch.empty(numel).data_ptr() % 4096 for numel in (1 << 19, 1 << 20, 5_000_000)])
"""


@pytest.mark.skipif(platform.system() != "Linux", reason="what torch does elsewhere is not known")
def test_large_tensors_of_a_rank_begin_at_pages():
    variables = {**os.environ, **allocator_settings({})}
    said = subprocess.run([sys.executable, "-c", ALIGNMENTS], env=variables, capture_output=True, text=True, check=True)
    assert said.stdout == "[0, 0, 0]\n"
