"""Checkpoints: seconds, share of the disk's speed and memory of saving, loading at the same and at another number of ranks, and
exporting, for whichever ``deepspeed`` an interpreter has and for FSDP2 with torch.distributed.checkpoint.

::

    python benchmarks/checkpoints.py DIR --compare ours=python:deepspeed:2 --compare dcp=python:fsdp2:3 \
        --compare other=/path/to/environment/bin/python:deepspeed:2

A candidate is ``NAME=PYTHON:ENGINE[:STAGE][:async]``. All train the GPT of ``gpt.py`` one step with AdamW in fp32. Files leave
the page cache before they are read. The disk's speed is that of one sequential stream past the page cache to a new file of
the same size, in turn with the candidates.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ranks import run_ranks

MEBIBYTE = 1 << 20
ACTIONS = ("save", "load", "reload", "export")


@dataclass(frozen=True)
class Candidate:
    """Who saves and loads. ``background`` asks for ``checkpoint.async_save``."""

    name: str
    python: str
    engine: str
    stage: int
    background: bool

    @staticmethod
    def parse(text: str) -> Candidate:
        """From ``NAME=PYTHON:ENGINE[:STAGE][:async]``."""
        name, _, rest = text.partition("=")
        python, engine, *more = rest.split(":")
        background = "async" in more
        stage = next((int(item) for item in more if item.isdigit()), 2)
        return Candidate(name, sys.executable if python == "python" else python, engine, stage, background)


def write_stream(path: Path, nbytes: int) -> float:
    """Seconds to write ``nbytes`` one after the other to a new file, until the disk has them."""
    memory = mmap.mmap(-1, 8 * MEBIBYTE)
    memory.write(os.urandom(MEBIBYTE) * 8)
    begin = time.perf_counter()
    descriptor = os.open(path, os.O_CREAT | os.O_WRONLY | getattr(os, "O_DIRECT", 0))
    for _ in range(-(-nbytes // len(memory))):
        os.write(descriptor, memory)
    os.fsync(descriptor)
    os.close(descriptor)
    seconds = time.perf_counter() - begin
    path.unlink()
    return seconds


def files_of(folder: Path) -> list[Path]:
    """All files below ``folder``."""
    return [path for path in folder.rglob("*") if path.is_file()]


def settle(folder: Path, *, forget: bool) -> None:
    """Have the disk keep all files; with ``forget`` the page cache no more."""
    for path in files_of(folder):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        if forget:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def measured(action: Callable[[], object]) -> dict[str, float]:
    """Seconds of ``action`` and the MB by which this process grew meanwhile, at its highest."""
    from measure import reset_peak, resident_bytes

    before = resident_bytes()
    reset_peak()
    begin = time.perf_counter()
    action()
    return {"seconds": time.perf_counter() - begin, "megabytes": (resident_bytes("VmHWM") - before) / 1e6}


def run_rank(action: str, candidate: Candidate, options: argparse.Namespace) -> None:
    """On a rank: do one action and have rank 0 write what it took, of the slowest and largest rank."""
    import torch
    import torch.distributed as dist

    folder, result = options.folder, options.result
    torch.set_num_threads(1)
    if action == "export":
        result.write_text(json.dumps(measured(lambda: export(candidate, folder))))
        return
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    engine = trained_engine(candidate, options.layers, options.vocabulary)
    dist.barrier()
    work = saving(candidate, engine, folder) if action == "save" else loading(candidate, engine, folder)
    own = measured(work)
    dist.barrier()
    if action == "save":
        begin = time.perf_counter()
        if candidate.background:
            engine.engine.destroy()
        dist.barrier()
        settle(folder, forget=False)
        own["until_on_disk"] = own["seconds"] + time.perf_counter() - begin
    everyones: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, own)
    if dist.get_rank() == 0:
        result.write_text(json.dumps({key: max(one[key] for one in everyones) for key in own}))


def trained_engine(candidate: Candidate, layers: int, vocabulary: int) -> Any:
    """An engine of ``engines.py`` after one step, so that it has optimizer states."""
    import torch
    from engines import Setup, build_engine
    from gpt import GPT, GPTShape

    if candidate.background:
        import deepspeed

        initialize = deepspeed.initialize

        def with_async(**arguments: Any) -> Any:
            arguments["config"]["checkpoint"] = {"async_save": True}
            return initialize(**arguments)

        deepspeed.initialize = with_async
    setup = Setup(candidate.engine, candidate.stage, 1, "fp32", 1, "torch_adam")
    engine = build_engine(GPT(GPTShape(layers=layers, vocabulary=vocabulary)), setup)
    engine.backward(torch.randint(0, vocabulary, (1, 33)), last=True)
    engine.step()
    return engine


def saving(candidate: Candidate, engine: Any, folder: Path) -> Callable[[], object]:
    """What saves all states to ``folder``."""
    if candidate.engine == "deepspeed":
        return lambda: engine.engine.save_checkpoint(str(folder), tag="saved")
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict

    def save() -> None:
        model, optimizer = get_state_dict(engine.model, engine.optimizer)
        dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=str(folder))

    return save


def loading(candidate: Candidate, engine: Any, folder: Path) -> Callable[[], object]:
    """What loads them."""
    if candidate.engine == "deepspeed":
        return lambda: engine.engine.load_checkpoint(str(folder), tag="saved")
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    def load() -> None:
        model, optimizer = get_state_dict(engine.model, engine.optimizer)
        state = {"model": model, "optimizer": optimizer}
        dcp.load(state, checkpoint_id=str(folder))
        set_state_dict(engine.model, engine.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])

    return load


def export(candidate: Candidate, folder: Path) -> None:
    """Write whole weights for other programs."""
    target = folder.with_name(f"{folder.name}.export")
    if candidate.engine == "deepspeed":
        from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict

        convert_zero_checkpoint_to_fp32_state_dict(str(folder), str(target), safe_serialization=True)
    else:
        from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

        dcp_to_torch_save(str(folder), str(target))


def measure(candidate: Candidate, options: argparse.Namespace) -> dict[str, Any]:
    """All actions of one candidate in turn; what one refuses is None."""
    folder = options.folder
    place = folder / candidate.name
    result = folder / "result.json"
    found: dict[str, Any] = {}
    for action in ACTIONS:
        script = [candidate.python, __file__, str(place), "--action", action, "--result", str(result)]
        script += ["--compare", f"{candidate.name}={candidate.python}:{candidate.engine}:{candidate.stage}"]
        script[-1] += ":async" if candidate.background else ""
        script += ["--layers", str(options.layers), "--vocabulary", str(options.vocabulary)]
        try:
            run_ranks(
                script, {"reload": options.others, "export": 1}.get(action, options.ranks), name=f"{candidate.name}, {action}"
            )
            found[action] = json.loads(result.read_text())
        except RuntimeError as error:
            found[action] = None
            print(str(error).splitlines()[-1], file=sys.stderr)
        if action == "save":
            found["nbytes"] = sum(path.stat().st_size for path in files_of(place))
        settle(place, forget=True)
    for path in folder.glob(f"{candidate.name}*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return found


def row(name: str, rounds: list[dict[str, Any]], disk: float) -> str:
    """One line of the table: medians over rounds. ``disk`` is in bytes per second."""

    def median(action: str, key: str) -> float | None:
        values = [one[action][key] for one in rounds if one[action] is not None]
        return statistics.median(values) if values else None

    def text(value: float | None, digits: int) -> str:
        return "refused".rjust(8) if value is None else f"{value:8.{digits}f}"

    durable = median("save", "until_on_disk")
    share = None if durable is None else rounds[0]["nbytes"] / durable / disk
    seconds = [text(value, 2) for value in (median("save", "seconds"), durable, share)]
    seconds += [text(median(action, "seconds"), 2) for action in ACTIONS[1:]]
    memory = [text(median(action, "megabytes"), 0) for action in ACTIONS]
    return f"{name:12} {rounds[0]['nbytes'] / 1e6:7.0f} " + " ".join(seconds + memory)


def main() -> None:
    """Measure and print, or do one action as a rank."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="DIR", type=Path, help="a directory on the disk")
    parser.add_argument(
        "--compare", action="append", type=Candidate.parse, required=True, help="NAME=PYTHON:ENGINE[:STAGE][:async]"
    )
    parser.add_argument("--ranks", type=int, default=2, help="that save and load (default 2)")
    parser.add_argument("--others", type=int, default=1, help="that load, too (default 1)")
    parser.add_argument("--rounds", type=int, default=1, help="of all candidates in turn (default 1)")
    parser.add_argument("--layers", type=int, default=8, help="blocks of the model (default 8)")
    parser.add_argument("--vocabulary", type=int, default=16384, help="its tokens (default 16384)")
    parser.add_argument("--action", choices=ACTIONS, help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.action:
        run_rank(arguments.action, arguments.compare[0], arguments)
        return
    found: dict[str, list[dict[str, Any]]] = {candidate.name: [] for candidate in arguments.compare}
    disk = []
    for _ in range(arguments.rounds):
        for candidate in arguments.compare:
            found[candidate.name].append(measure(candidate, arguments))
            nbytes = found[candidate.name][-1]["nbytes"]
            disk.append(nbytes / write_stream(arguments.folder / "stream", nbytes))
            print(
                candidate.name, json.dumps(found[candidate.name][-1]), f"disk {disk[-1] / 1e9:.2f}", file=sys.stderr, flush=True
            )
    speed = statistics.median(disk)
    print(f"the disk takes {speed / 1e9:.2f} GB/s ({min(disk) / 1e9:.2f} to {max(disk) / 1e9:.2f})")
    print(f"{'':12} {'':7} {'seconds':>53} {'MB more':>27}")
    heads = ["save", "on disk", "x disk", "load", f"load {arguments.others}", "export", *ACTIONS]
    print(f"{'':12} {'MB':>7} " + " ".join(f"{head:>8}" for head in heads))
    for name, rounds in found.items():
        print(row(name, rounds, speed))


if __name__ == "__main__":
    main()
