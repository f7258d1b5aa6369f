from __future__ import annotations

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from deepspeed.profiling.trace import trace_step

ROWS, WIDTH = 64, 32
ACTIVATION = ROWS * WIDTH * 4


def traced(*, checkpointed: bool):
    with FakeTensorMode():
        blocks = [nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Sigmoid()) for _ in range(2))) for _ in range(4)]
        model, inputs = nn.Sequential(*blocks), torch.zeros(ROWS, WIDTH)

        def loss() -> torch.Tensor:
            x = inputs
            for block in blocks:
                x = checkpoint(block, x, use_reentrant=False) if checkpointed else block(x)
            return x.sum()

        return trace_step(model, loss)


def test_what_forward_keeps_is_counted_and_gradients_arrive_from_the_last_layer_on() -> None:
    trace = traced(checkpointed=False)
    assert len(trace.arrivals) == 16 and trace.arrivals[0].name.startswith("3.1.0.")
    # A sigmoid keeps its output, which is the next layer's input; the operation at hand has a few more.
    assert 8 * ACTIVATION <= trace.arrivals[0].live <= 12 * ACTIVATION
    assert trace.arrivals[-1].live < 4 * ACTIVATION
    assert trace.flops == 2 * ROWS * WIDTH * WIDTH * (8 * 3 - 1)  # nobody asks for the gradient of the input


def test_checkpointed_blocks_keep_their_inputs_and_compute_again() -> None:
    whole, checkpointed = traced(checkpointed=False), traced(checkpointed=True)
    assert checkpointed.arrivals[0].live < 0.85 * whole.arrivals[0].live
    assert checkpointed.flops > 1.2 * whole.flops
