from __future__ import annotations

import pytest

from deepspeed.launcher.errors import LaunchError
from deepspeed.launcher.hostfile import fetch_hostfile, parse_inclusion_exclusion, parse_resource_filter

POOL = {"worker-0": 4, "worker-1": 4}


def test_a_hostfile_lists_hosts_with_their_slots_in_order(tmp_path):
    path = tmp_path / "hosts"
    path.write_text("# our machines\n\nworker-1 slots=8\n  worker-0   slots=2  # the old one\n")
    assert list(fetch_hostfile(path).items()) == [("worker-1", 8), ("worker-0", 2)]


def test_no_hostfile_is_no_pool(tmp_path):
    assert fetch_hostfile(tmp_path / "none") is None
    assert fetch_hostfile(None) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a slots=2\nb 4\n", r"hosts, line 2: 'b 4' is not of the form 'hostname slots=8'"),
        ("a slots=two\n", "line 1: 'a slots=two'"),
        ("a slots=-1\n", "line 1"),
        ("slots=2\n", "line 1"),
        ("a slots=2\n\na slots=4\n", "line 3: host a stands there twice"),
        ("a slots=0\n", "line 1: host a has no slots"),
        ("# nobody\n", "names no host"),
    ],
)
def test_a_malformed_hostfile_is_an_error_with_file_and_line(tmp_path, text, message):
    path = tmp_path / "hosts"
    path.write_text(text)
    with pytest.raises(LaunchError, match=message):
        fetch_hostfile(path)


@pytest.mark.parametrize(
    ("include", "exclude", "left"),
    [
        ("", "", {"worker-0": [0, 1, 2, 3], "worker-1": [0, 1, 2, 3]}),
        ("worker-1", "", {"worker-1": [0, 1, 2, 3]}),
        ("worker-1:2,0@worker-0", "", {"worker-0": [0, 1, 2, 3], "worker-1": [0, 2]}),
        ("worker-0:1@worker-0:3", "", {"worker-0": [1, 3]}),
        ("", "worker-0", {"worker-1": [0, 1, 2, 3]}),
        ("", "worker-0:0,2@worker-1:3", {"worker-0": [1, 3], "worker-1": [0, 1, 2]}),
        ("", "worker-0:0,1,2,3", {"worker-1": [0, 1, 2, 3]}),
    ],
)
def test_a_filter_leaves_the_documented_slots(include, exclude, left):
    active = parse_inclusion_exclusion(POOL, include, exclude)
    assert list(active.items()) == list(left.items())


@pytest.mark.parametrize(
    ("include", "exclude", "message"),
    [
        ("worker-2", "", "unknown host 'worker-2'; known hosts: worker-0, worker-1"),
        ("", "worker-2:0", "unknown host 'worker-2'"),
        ("worker-0:4", "", "worker-0 has no slot 4; its slots: 0, 1, 2, 3"),
        ("worker-0:", "", "'' is not a slot of worker-0"),
        ("worker-0:a", "", "'a' is not a slot"),
        ("worker-0", "worker-1", "contradict each other"),
        ("", "worker-0@worker-1", "no slot is left"),
    ],
)
def test_a_wrong_filter_is_an_error_that_names_what_is_wrong(include, exclude, message):
    with pytest.raises(LaunchError, match=message):
        parse_inclusion_exclusion(POOL, include, exclude)


def test_slots_of_a_filter_are_those_of_the_host_not_positions():
    assert parse_resource_filter({"a": [4, 5, 7]}, exclude_str="a:5") == {"a": [4, 7]}
