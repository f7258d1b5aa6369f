"""Steps of the original package's CPU Adam, timed on demand: run by its Python, driven by ``adam.py`` line by line.

Each line of the input is a case ("fp32" or "bf16") and a number of threads; the answer is the seconds of one step.
"""

from __future__ import annotations

import sys
import time

import torch

from deepspeed.ops.adam import DeepSpeedCPUAdam


def main() -> None:
    """Answer until the input ends."""
    numel = int(sys.argv[1])
    cases = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        parameter = torch.nn.Parameter(torch.randn(numel).to(dtype))
        parameter.grad = torch.randn(numel).to(dtype)
        cases[name] = DeepSpeedCPUAdam([parameter], lr=1e-3, weight_decay=0.01, adamw_mode=True)
    print("ready", flush=True)
    for line in sys.stdin:
        name, threads = line.split()
        torch.set_num_threads(int(threads))
        start = time.perf_counter()
        cases[name].step()
        print(f"seconds {time.perf_counter() - start}", flush=True)


if __name__ == "__main__":
    main()
