"""``deepspeed plan``: which ZeRO stage and tier a model needs on given hardware, and the configuration for it."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from ..accelerator import get_accelerator
from ..config.offload import AioConfig
from ..memory.demand import Rates
from ..memory.files import queue_options
from .plan_candidates import Candidate, Hardware, candidates, choose, refusal
from .plan_model import Workload, model_maker, trace_model
from .rates import base_bytes, copy_rate, disk_rates, multiplication_rate

WIDTH = 120
"""Columns where the output is no terminal."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command on ``argv`` (the arguments after ``plan``); returns its exit code: 1 where nothing fits, 2 for bad
    input."""
    options = _parser().parse_args(argv)
    try:
        with redirect_stdout(sys.stderr):  # what libraries say of their models is not the plan
            found, what = _candidates(options)
    except (OSError, ValueError) as error:
        print(f"deepspeed plan: error: {error}", file=sys.stderr)
        return 2
    hardware = _hardware(options)
    best = choose(found, hardware)
    console = Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False, soft_wrap=True)
    numel = found[0].layout.parameter_numel
    ranks = "1 rank" if options.gpus == 1 else f"{options.gpus} ranks"
    console.print(
        f"{numel / 1e9:.3f} G parameters ({what}), {options.precision}, {options.micro_batch} x {options.context} tokens, "
        f"{ranks}"
    )
    console.print(_table(found, best, hardware))
    if best is None:
        print("\n".join(refusal(found, hardware)), file=sys.stderr)
        return 1
    console.print(_account(best))
    configuration = json.dumps(best.configuration, indent=2)
    if options.write is None:
        print(configuration)
    else:
        options.write.write_text(configuration + "\n")
        print(f"the configuration is in {options.write}")
    if best.settings.stage == 3:
        print("construct the model within deepspeed.zero.Init(config_dict_or_path=...)")
    if best.workload.checkpointing:
        print("let each block of the model checkpoint its activations")
    return 0


def _candidates(options: argparse.Namespace) -> tuple[list[Candidate], str]:
    make, what = model_maker(options.model)
    rates = _rates(options)
    choices = {"on": [True], "off": [False], "either": [False, True]}[options.checkpointing]
    found: list[Candidate] = []
    for checkpointing in choices:
        workload = Workload(options.micro_batch, options.context, DTYPES[options.precision], checkpointing)
        model, trace = trace_model(make, workload)
        base = base_bytes() if options.base is None else options.base  # with all that training imports, too
        found += candidates(model, trace, workload, _hardware(options), rates, base=base)
    return found, what


def _hardware(options: argparse.Namespace) -> Hardware:
    return Hardware(options.memory, options.disk, options.gpus, str(options.folder))


def _rates(options: argparse.Namespace) -> Rates:
    """As given, and else measured; a disk is measured where it is to be used."""
    read = write = options.disk_rate or float("inf")
    if options.disk and options.disk_rate is None:
        options.folder.mkdir(parents=True, exist_ok=True)
        read, write = disk_rates(options.folder, queue_options(AioConfig()))
    multiply = options.flops or multiplication_rate(DTYPES[options.precision])
    return Rates(multiply, options.memory_rate or copy_rate(), read, write, options.network_rate)


def _table(found: Sequence[Candidate], best: Candidate | None, hardware: Hardware) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("", "stage", "on the disk", "checkpointing"):
        table.add_column(name)
    for name in ("memory/rank", "disk/rank", "step"):
        table.add_column(name, justify="right")
    table.add_column("fits")
    for candidate in found:
        missing = candidate.missing(hardware)
        table.add_row(
            "best" if candidate is best else "",
            str(candidate.settings.stage),
            candidate.on_disk,
            "yes" if candidate.workload.checkpointing else "no",
            f"{candidate.needs.peak / 1e9:.2f} GB",
            f"{candidate.needs.disk.total / 1e9:.2f} GB",
            f"{candidate.seconds:.3g} s",
            "yes" if not missing else f"no: {' and '.join(missing)}",
        )
    return table


def _account(best: Candidate) -> str:
    """The sum behind the best candidate's memory and time."""
    needs, time = best.needs, best.time
    parts = {
        "Python and libraries": needs.base,
        "parameters": needs.states.parameters,
        "gradients": needs.states.gradients,
        "masters": needs.states.master,
        "optimizer states": needs.states.optimizer,
        "activations": needs.live,
        "gradients on their way": needs.reducing,
        "gathered units": needs.units,
    }
    shown = [f"{name} {nbytes / 1e9:.2f}" for name, nbytes in parts.items() if nbytes > 5e6]
    times = {
        "arithmetic": time.computing,
        "disk beside it": time.computing_disk,
        "optimizer": time.optimizer,
        "disk beside it ": time.optimizer_disk,
        "communication": time.communication,
    }
    spent = [f"{name.strip()} {seconds:.3g} s" for name, seconds in times.items() if seconds]
    unknown = "" if time.communication or best.settings.ranks == 1 else "; communication is not counted: give --network-rate"
    stepping = f"; the optimizer's step has {needs.stepping / 1e9:.2f} beside the states instead" if needs.stepping else ""
    return f"memory of a rank (GB): {', '.join(shown)}{stepping}\nstep: {', '.join(spent)}{unknown}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="deepspeed plan",
        description="Which ZeRO stage and tier trains a model with AdamW on given hardware, what each takes, and a "
        "configuration for the fastest that fits. Nothing is allocated: the model runs on tensors without memory.",
    )
    kind = get_accelerator().kind
    parser.add_argument("--model", required=True, metavar="PATH|SIZE", help="directory or config.json, or such as 7B, 350M")
    parser.add_argument("--memory", type=nbytes, required=True, metavar="BYTES", help="of each rank, such as 24GB")
    parser.add_argument("--disk", type=nbytes, default=0, metavar="BYTES", help="of all ranks (default: none is used)")
    parser.add_argument("--gpus", type=_count, default=1, metavar="N", help="data-parallel ranks of a machine (default: 1)")
    parser.add_argument("--micro-batch", type=_count, default=1, metavar="N", help="sequences of a rank (default: 1)")
    parser.add_argument("--context", type=_count, default=1024, metavar="N", help="tokens of a sequence (default: 1024)")
    precision = "fp32" if kind == "cpu" else "bf16"
    parser.add_argument("--precision", choices=DTYPES, default=precision, help="of the model (default: %(default)s)")
    parser.add_argument(
        "--checkpointing", choices=("on", "off", "either"), default="either", help="of activations (default: either)"
    )
    parser.add_argument("--folder", type=Path, default=Path("nvme"), help="on the disk (default: ./nvme)")
    parser.add_argument("--base", type=nbytes, metavar="BYTES", help="of Python and libraries (default: this process's)")
    parser.add_argument("--flops", type=float, metavar="N", help="per second and rank (default: measured)")
    parser.add_argument("--memory-rate", type=nbytes, metavar="BYTES", help="copied per second (default: measured)")
    parser.add_argument("--disk-rate", type=nbytes, metavar="BYTES", help="per second (default: measured in --folder)")
    parser.add_argument("--network-rate", type=nbytes, metavar="BYTES", help="per second and rank (default: not counted)")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the configuration there instead of printing it")
    return parser


_NBYTES = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([KMGT])(i?))?B?(?:/s)?", re.IGNORECASE)


def nbytes(text: str) -> int:
    """A number of bytes, as 24GB, 24GiB, 500M or 1e9."""
    found = _NBYTES.fullmatch(text.strip())
    if found is None:
        raise argparse.ArgumentTypeError(f"found {text}, expected bytes such as 24GB, 24GiB or 500MB")
    power = " KMGT".index((found[2] or " ").upper())
    return int(float(found[1]) * (1024 if found[3] else 1000) ** power)


def _count(text: str) -> int:
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"found {text}, expected a whole number of at least 1")
    return number
