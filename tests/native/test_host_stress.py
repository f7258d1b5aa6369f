from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
SOURCES = [Path(__file__).with_name("host_stress.cpp")]
SOURCES += [CSRC / f"{name}.cpp" for name in ("host_group", "host_steps", "host_segment", "dispatch", "kernels_portable")]


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
@pytest.mark.parametrize("ranks", [2, 3])
def test_random_collectives_of_threads_give_what_arithmetic_gives_and_do_not_race(tmp_path_factory, ranks):
    program = tmp_path_factory.getbasetemp() / "host_stress"
    if not program.exists():
        command = ["g++", "-std=c++17", "-O1", "-fsanitize=thread", "-pthread", *map(str, SOURCES), "-o", str(program)]
        built = subprocess.run(command, capture_output=True, text=True)
        if "libtsan" in built.stderr:
            pytest.skip("this g++ has no ThreadSanitizer")
        assert built.returncode == 0, built.stderr
    ran = subprocess.run([str(program), "2000", str(ranks), "1"], capture_output=True, text=True, timeout=100)
    assert (ran.stdout, ran.returncode) == ("as expected\n", 0), ran.stderr
