from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from deepspeed.config.monitoring import CometConfig, CsvConfig, TensorBoardConfig, WandbConfig
from deepspeed.monitor.monitor import CometMonitor, MonitorMaster, TensorBoardMonitor, WandbMonitor, csvMonitor

EVENTS = [("Train/loss", 0.5, 8), ("Train/lr", 0.1, 8), ("Train/loss", 0.25, 16)]


def config(**sections: dict[str, Any]) -> SimpleNamespace:
    kinds = {"tensorboard": TensorBoardConfig, "wandb": WandbConfig, "comet": CometConfig, "csv_monitor": CsvConfig}
    return SimpleNamespace(**{name: kind(**sections.get(name, {})) for name, kind in kinds.items()})


def csv_config(path: Path) -> SimpleNamespace:
    return config(csv_monitor={"enabled": True, "output_path": str(path), "job_name": "job"})


class Recorder:
    """Stands for a library, a run or an experiment: records calls and returns itself."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Recorder:
            self.calls.append((name, args, kwargs))
            return self

        return call


def test_csv_writes_one_file_per_tag_with_a_header(tmp_path: Path) -> None:
    MonitorMaster(csv_config(tmp_path)).write_events(EVENTS)
    assert (tmp_path / "job" / "Train_loss.csv").read_text() == "step,Train/loss\n8,0.5\n16,0.25\n"
    assert (tmp_path / "job" / "Train_lr.csv").read_text() == "step,Train/lr\n8,0.1\n"


def test_a_resumed_run_appends_without_a_second_header(tmp_path: Path) -> None:
    for step in (1, 2):
        monitor = csvMonitor(csv_config(tmp_path))
        monitor.write_events([("loss", 1.0, step)])
        monitor.close()
    assert (tmp_path / "job" / "loss.csv").read_text() == "step,loss\n1,1.0\n2,1.0\n"


def test_tags_that_would_share_a_file_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'a/b' and 'a_b' would share"):
        csvMonitor(csv_config(tmp_path)).write_events([("a/b", 1.0, 1), ("a_b", 1.0, 1)])


def test_only_rank_0_writes(tmp_path: Path) -> None:
    master = MonitorMaster(csv_config(tmp_path), rank=1)
    master.write_events(EVENTS)
    assert not master.enabled
    assert not list(tmp_path.iterdir())


def test_nothing_is_written_where_nothing_is_enabled_or_after_close(tmp_path: Path) -> None:
    assert not MonitorMaster(config()).enabled
    master = MonitorMaster(csv_config(tmp_path))
    assert master.enabled
    master.close()
    master.close()
    master.write_events(EVENTS)
    assert not master.enabled
    assert not list((tmp_path / "job").iterdir())


def test_tensorboard_reads_back_what_was_written(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monitor = TensorBoardMonitor(config(tensorboard={"enabled": True, "output_path": str(tmp_path), "job_name": "j"}))
    monitor.write_events(EVENTS)
    monitor.close()
    events = accumulator.EventAccumulator(str(tmp_path / "j"))
    events.Reload()
    assert [(event.value, event.step) for event in events.Scalars("Train/loss")] == [(0.5, 8), (0.25, 16)]


def test_wandb_logs_the_values_of_a_step_together(monkeypatch: pytest.MonkeyPatch) -> None:
    library = Recorder()
    monkeypatch.setitem(sys.modules, "wandb", library)
    monitor = WandbMonitor(config(wandb={"enabled": True, "team": "t", "group": "g", "project": "p"}))
    monitor.write_events(EVENTS)
    monitor.close()
    assert library.calls == [
        ("init", (), {"project": "p", "group": "g", "entity": "t"}),
        ("log", ({"Train/loss": 0.5, "Train/lr": 0.1},), {"step": 8}),
        ("log", ({"Train/loss": 0.25},), {"step": 16}),
        ("finish", (), {}),
    ]


def test_comet_logs_every_so_many_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    library = Recorder()
    monkeypatch.setitem(sys.modules, "comet_ml", library)
    section = {"enabled": True, "project": "p", "experiment_name": "e", "online": False, "samples_log_interval": 10}
    monitor = CometMonitor(config(comet=section))
    for step in (1, 9, 11, 12):
        monitor.write_events([("loss", 0.5, step)])
    monitor.close()
    assert library.calls == [
        ("start", (), {"project": "p", "online": False}),
        ("set_name", ("e",), {}),
        ("log_metric", ("loss", 0.5), {"step": 1}),
        ("log_metric", ("loss", 0.5), {"step": 11}),
        ("end", (), {}),
    ]


@pytest.mark.parametrize(
    ("section", "module", "extra"),
    [("wandb", "wandb", "wandb"), ("comet", "comet_ml", "comet"),
     ("tensorboard", "torch.utils.tensorboard", "tensorboard")],
)  # fmt: skip
def test_a_missing_library_names_what_to_install(
    section: str, module: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"{section}\.enabled is true.*pip install deepspeed\[{extra}\]"):
        MonitorMaster(config(**{section: {"enabled": True}}))
