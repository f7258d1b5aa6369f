"""The command line, and the DeepSpeed configuration that it and ds_config.json give together."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any, NoReturn

import torch

import deepspeed

DESCRIPTION = "Train a GPT with ZeRO on the source code of Python's standard library, or on any text."


def fail(message: str) -> NoReturn:
    """End the program for a mistake that every rank has found; the first one says it."""
    raise SystemExit(message if os.environ.get("RANK", "0") == "0" else 2)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        fail(f"train.py: error: {message}")


def parse_options() -> argparse.Namespace:
    """The command line's options; ends the program where one of them is wrong."""
    parser = _Parser(description=DESCRIPTION)
    parser.add_argument("--text", metavar="PATH", help="a text file or folder (default: Python's standard library)")
    parser.add_argument("--output", metavar="PATH", default="runs/train_lm", help="checkpoints, report, tokenized text")
    parser.add_argument("--steps", type=_count, metavar="N", help="length of training (default: the schedule's)")
    parser.add_argument("--fresh", action="store_true", help="start anew, whatever --output holds")
    parser.add_argument("--stage", type=int, choices=[0, 1, 2], help="ZeRO stage (default: the configuration's)")
    parser.add_argument("--precision", choices=["fp32", "bf16", "fp16"], help="default: what this machine computes fast")
    parser.add_argument("--layers", type=_count, default=5, metavar="N", help="default: %(default)s")
    parser.add_argument("--width", type=_count, default=384, metavar="N", help="default: %(default)s")
    parser.add_argument("--heads", type=_count, default=6, metavar="N", help="default: %(default)s")
    parser.add_argument("--context", type=_count, default=128, metavar="N", help="tokens in a window (%(default)s)")
    parser.add_argument("--vocabulary", type=_count, default=4096, metavar="N", help="of the tokenizer (%(default)s)")
    parser.add_argument("--evaluate_every", type=_count, default=25, metavar="N", help="steps (default: %(default)s)")
    parser.add_argument("--prompt", metavar="TEXT", help="what the sample of generated text begins with")
    deepspeed.add_config_arguments(parser)
    parser.set_defaults(deepspeed_config=str(Path(__file__).with_name("ds_config.json")))
    options = parser.parse_args()
    if options.width % options.heads:
        parser.error(f"--width {options.width} is not a multiple of --heads {options.heads}")
    return options


def configuration(options: argparse.Namespace) -> dict[str, Any]:
    """The configuration file's content, overridden by the options that were given."""
    try:
        config: dict[str, Any] = json.loads(Path(options.deepspeed_config).read_text())
    except (OSError, ValueError) as error:
        fail(f"--deepspeed_config {options.deepspeed_config}: {error}")
    if options.stage is not None:
        config["zero_optimization"] = {**config.get("zero_optimization", {}), "stage": options.stage}
    if options.steps is not None and "scheduler" in config:
        config["scheduler"]["params"]["total_num_steps"] = options.steps
    chosen = any(config.get(name, {}).get("enabled") for name in ("bf16", "fp16"))
    precision = options.precision or (None if chosen else fast_precision())
    if precision is not None:
        for name in ("bf16", "fp16"):
            config[name] = {**config.get(name, {}), "enabled": name == precision}
    return config


def training_length(config: dict[str, Any], options: argparse.Namespace) -> int:
    """The steps of one run from start to end: ``--steps``, or the length of the configured schedule."""
    length = options.steps or config.get("scheduler", {}).get("params", {}).get("total_num_steps")
    if length is None:
        fail("the configuration's schedule has no total_num_steps: say with --steps how long to train")
    return int(length)


def fast_precision() -> str:
    """bf16 where the hardware multiplies bf16 matrices itself, else fp32; a CPU without it takes 5 times as long."""
    if torch.cuda.is_available():
        native = torch.cuda.get_device_capability() >= (8, 0)
    else:
        capabilities = getattr(torch.cpu, "get_capabilities", dict)()
        native = any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16"))
    return "bf16" if native else "fp32"


def _count(text: str) -> int:
    """A whole number above 0."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not above 0")
    return value
