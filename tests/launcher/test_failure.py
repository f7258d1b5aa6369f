from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from deepspeed.launcher import failure
from deepspeed.launcher.failure import Death, ErrorRecord, first_cause, oom_kill_counts, oom_killed
from tests.launcher.conftest import Start

LIMIT_NBYTES = 800 << 20
"""Room for the launcher, which has torch, and for one rank that has none."""

ALLOCATE = """
import os, time
held = []
while os.environ["RANK"] == "1":
    held.append(bytes(range(256)) * 65536)
time.sleep(60)
"""


@pytest.fixture
def counters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, str]], dict[str, int]]:
    """``counters(files)``: what is counted where the kernel shows these files under ``/proc`` and ``/sys/fs/cgroup``."""
    monkeypatch.setattr(failure, "PROCESS", tmp_path / "proc")
    monkeypatch.setattr(failure, "CGROUPS", tmp_path / "cgroup")

    def count(files: dict[str, str]) -> dict[str, int]:
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        return {str(path.relative_to(tmp_path)): number for path, number in oom_kill_counts().items()}

    return count


@pytest.mark.parametrize(
    ("groups", "file"),
    [
        ("0::/\n", "cgroup/memory.events"),
        ("0::/job/7\n", "cgroup/job/7/memory.events"),
        ("5:cpu:/x\n4:cpuset,memory:/job\n0::/\n", "cgroup/memory/job/memory.oom_control"),
        ("4:memory:/job/that/only/the/host/sees\n", "cgroup/memory/memory.oom_control"),
    ],
)
def test_kills_are_counted_in_the_groups_of_either_version_and_for_the_machine(counters, groups, file):
    found = counters({"proc/self/cgroup": groups, file: "oom_kill_disable 0\noom_kill 3\n", "proc/vmstat": "oom_kill 5\n"})
    assert found == {file: 3, "proc/vmstat": 5}


def test_a_machine_that_counts_nothing_is_no_error(counters):
    assert counters({}) == {}
    assert counters({"proc/self/cgroup": "0::/\n", "cgroup/memory.events": "low 0\n"}) == {}


@pytest.mark.parametrize(
    ("exit_code", "after", "killed"),
    [(-9, {"a": 1, "b": 3}, True), (-9, {"a": 1, "b": 2}, False), (-11, {"a": 1, "b": 3}, False), (-9, {"new": 1}, False)],
)
def test_a_kill_while_a_counter_rose_is_for_want_of_memory(exit_code, after, killed):
    before = {Path("a"): 1, Path("b"): 2}
    assert oom_killed(exit_code, before, {Path(name): count for name, count in after.items()}) is killed


def death(rank: int, exit_code: int, raised_at: float | None = None, out_of_memory: bool = False) -> Death:
    record = None if raised_at is None else ErrorRecord("ValueError: no", "", raised_at)
    return Death(rank, 1, exit_code, record, "", 0, out_of_memory)


def test_the_first_cause_is_a_kill_for_want_of_memory_then_a_crash_then_the_earliest_error():
    exit_code, late, early = death(0, 3), death(1, 1, raised_at=2.0), death(2, 1, raised_at=1.0)
    crash, killed = death(3, -11), death(4, -9, out_of_memory=True)
    for deaths, first in (
        ([exit_code], exit_code),
        ([exit_code, late, early], early),
        ([exit_code, late, early, crash], crash),
        ([exit_code, late, early, crash, killed], killed),
    ):
        assert first_cause(deaths) is first


@pytest.fixture
def limited_group() -> Iterator[Path]:
    """A control group within our own whose processes may use `LIMIT_NBYTES` of memory."""
    own = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    places = {controllers: place for _, controllers, place in own}
    root, limit = (
        (Path("/sys/fs/cgroup/memory") / places["memory"].lstrip("/"), "memory.limit_in_bytes")
        if "memory" in places
        else (Path("/sys/fs/cgroup") / places.get("", "/").lstrip("/"), "memory.max")
    )
    group = root / "deepspeed-test"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"cannot make a control group: {error}")
    try:
        (group / limit).write_text(str(LIMIT_NBYTES))
        yield group
    except OSError as error:
        pytest.skip(f"cannot limit the memory of a control group: {error}")
    finally:
        group.rmdir()


def test_a_rank_that_the_kernel_kills_for_want_of_memory_is_called_that(start: Start, limited_group: Path):
    launcher = start(["--num_gpus", "2"], ALLOCATE)
    (limited_group / "cgroup.procs").write_text(str(launcher.pid))
    _, errors = launcher.communicate(timeout=60)
    assert launcher.returncode == 128 + signal.SIGKILL, errors
    assert "rank 1 failed" in errors and "killed by the kernel: out of memory" in errors
    assert "use a higher ZeRO stage" in errors and "stopped rank 0" in errors
