"""Models to plan for: a configuration of Transformers, or a size with an assumed shape, on tensors without memory."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from ..memory.demand import Trace
from ..profiling.trace import trace_step

VOCABULARY = 32_000
HEAD_WIDTH = 128
_SIZE = re.compile(r"(\d+(?:\.\d+)?)([MBG])", re.IGNORECASE)
_UNITS = {"M": 1e6, "B": 1e9, "G": 1e9}


@dataclass(frozen=True)
class Workload:
    """A micro-batch of ``sequences`` of ``context`` tokens; parameters and activations of ``dtype``; with ``checkpointing``
    each block keeps its input and computes the rest again in backward."""

    sequences: int
    context: int
    dtype: torch.dtype
    checkpointing: bool


class Decoder(nn.Module):
    """The model that is assumed of a size: pre-norm blocks of 12 * width^2 parameters, heads of 128, an untied output."""

    def __init__(self, layers: int, width: int):
        super().__init__()
        self.checkpointing = False
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """The mean loss of predicting ``tokens`` (sequences, context)."""
        x = self.tokens(tokens)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointing else block(x)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


class _Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.heads = max(1, width // HEAD_WIDTH)
        self.attention_norm, self.feed_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.projection = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2], is_causal=True)
        x = x + self.projection(attended.transpose(1, 2).reshape(batch, length, width))
        return x + self.feed(self.feed_norm(x))


ModelMaker = Callable[[torch.dtype], nn.Module]
"""Makes the model anew with parameters of a dtype, in the mode that is in force."""


def model_maker(source: str) -> tuple[ModelMaker, str]:
    """How to make the model that ``source`` names, and what it is: a directory or config.json of Transformers, or a size
    such as 7B or 350M. ValueError for anything else."""
    if (size := _SIZE.fullmatch(source)) is not None:
        layers, width = decoder_shape(float(size[1]) * _UNITS[size[2].upper()])
        return partial(_decoder, layers, width), f"assumed: {layers} layers of width {width}, {VOCABULARY} tokens"
    path = Path(source)
    if not path.exists():
        raise ValueError(f"--model {source} is neither a size, such as 7B or 350M, nor a directory or config.json")
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError:
        raise ValueError(f"--model {source} needs transformers to be read: install it, or give a size such as 7B") from None
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"--model {source}: {error}") from None
    return lambda dtype: AutoModelForCausalLM.from_config(config, dtype=dtype), f"{config.model_type} of {source}"


def _decoder(layers: int, width: int, dtype: torch.dtype) -> nn.Module:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return Decoder(layers, width)
    finally:
        torch.set_default_dtype(before)


def decoder_shape(parameters: float) -> tuple[int, int]:
    """Layers and width of a decoder of about so many parameters: its width is 128 times its layers, as of most models from
    1 to 70 G, and a multiple of 128."""
    layers = 1
    while _decoder_numel(layers + 1, HEAD_WIDTH * (layers + 1)) <= parameters:
        layers += 1
    width = HEAD_WIDTH * layers
    block = 12 * width**2
    return max(1, round((parameters - 2 * VOCABULARY * width) / block)), width


def _decoder_numel(layers: int, width: int) -> int:
    return 12 * layers * width**2 + 2 * VOCABULARY * width


def trace_model(make: ModelMaker, workload: Workload) -> tuple[nn.Module, Trace]:
    """The model without memory, and a micro-batch's forward and backward of it."""
    with FakeTensorMode():
        model = make(workload.dtype).train()
        if workload.checkpointing:
            enable_checkpointing(model)
        tokens = torch.zeros(workload.sequences, workload.context, dtype=torch.long)
        trace = trace_step(model, partial(loss_of, model, tokens))
    return model, trace


def enable_checkpointing(model: nn.Module) -> None:
    """Let each block keep its input alone."""
    if isinstance(model, Decoder):
        model.checkpointing = True
        return
    found: Any = model
    enable = getattr(found, "activation_checkpointing_enable", None) or found.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """The loss of ``tokens``, whatever the model is."""
    if isinstance(model, Decoder) or not hasattr(model, "config"):
        return model(tokens)
    found: Tensor = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    return found
