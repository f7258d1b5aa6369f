from __future__ import annotations

import json
from pathlib import Path

import pytest

from deepspeed.cli import nvme_bench
from deepspeed.config import load_config
from deepspeed.launcher.runner import main

SMALL = ["--size", "1M", "--rounds", "2", "--block-sizes", "64K,256K", "--queue-depths", "2,4"]


def test_the_best_settings_are_printed_as_a_section_of_a_configuration(tmp_path: Path, capsys) -> None:
    assert main(["nvme-bench", str(tmp_path), *SMALL]) == 0
    table, _, section = capsys.readouterr().out.partition("{")
    rows = [line.split() for line in table.splitlines()]
    assert ["best" in row for row in rows].count(True) == 1
    assert next(row for row in rows if row[:2] == ["plain", "stream"])[-3::2] == ["1.00", "1.00"]
    assert len([row for row in rows if {"65536", "262144"} & set(row)]) == 4
    config = load_config({"train_batch_size": 1, **json.loads("{" + section)}, world_size=1)
    assert config.aio.block_size in (65536, 262144) and config.aio.queue_depth in (2, 4)
    assert list(tmp_path.iterdir()) == []


def test_the_section_goes_to_a_file_and_that_of_a_configuration_is_measured_too(tmp_path: Path, capsys) -> None:
    given = tmp_path / "ds_config.json"
    given.write_text(json.dumps({"train_batch_size": 1, "aio": {"block_size": 131072, "thread_count": 3}}))
    arguments = [*SMALL[:4], "--block-sizes", "131072", "--queue-depths", "8", "--thread-counts", "3"]
    output = tmp_path / "aio.json"
    command = [str(tmp_path), *arguments, "--config", str(given), "--output", str(output), "--backend", "python"]
    assert nvme_bench.main(command) == 0
    # The only combination is that of the configuration: it is measured once.
    assert json.loads(output.read_text())["aio"] == {
        "block_size": 131072,
        "queue_depth": 8,
        "thread_count": 3,
        "single_submit": False,
        "overlap_events": True,
    }
    assert str(output) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing"], "missing is no directory"),
        ([".", "--queue-depths", "5000"], "queue_depth is 5000, expected 1 to 4096"),
        ([".", "--config", '{"aio": {"use_gds": true}, "train_batch_size": 1}'], "GPUDirect storage is not built yet"),
    ],
)
def test_bad_input_is_an_error_and_no_traceback(arguments: list[str], message: str, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert nvme_bench.main([*arguments, "--size", "64K"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--size", "0"], ["--size", "1T"], ["--queue-depths", "1,,2"]])
def test_a_number_that_is_none_is_refused(arguments: list[str], capsys) -> None:
    with pytest.raises(SystemExit):
        nvme_bench.main([".", *arguments])
    assert "expected a whole number of at least 1" in capsys.readouterr().err
