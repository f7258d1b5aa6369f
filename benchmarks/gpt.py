"""The GPT that the benchmarks train: pre-norm blocks, learned positions, causal attention, an untied output head.

The default size has 60.6 M parameters: 8 blocks of 4.9 M, and 2 x 10.5 M for the two ends of a 16384-token vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class GPTShape:
    """The size of a :class:`GPT`."""

    layers: int = 8
    width: int = 640
    heads: int = 10
    vocabulary: int = 16384
    context: int = 128


class Block(nn.Module):
    """Attention and a feed-forward of four times the width, each behind a LayerNorm and added to its input."""

    def __init__(self, shape: GPTShape) -> None:
        super().__init__()
        width = shape.width
        self.heads = shape.heads
        self.attention_norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` and the result: [batch, token, width]."""
        batch, tokens, width = x.shape
        qkv = self.query_key_value(self.attention_norm(x)).view(batch, tokens, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each [batch, head, token, width / heads]
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.attention_out(mixed.transpose(1, 2).reshape(batch, tokens, width))
        widened = F.gelu(self.up(self.feed_forward_norm(x)))
        changed: Tensor = x + self.down(widened)
        return changed


class GPT(nn.Module):
    """Predicts each next token; called with tokens it returns the mean loss."""

    def __init__(self, shape: GPTShape) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(shape.vocabulary, shape.width)
        self.position_embedding = nn.Embedding(shape.context, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width)
        self.head = nn.Linear(shape.width, shape.vocabulary, bias=False)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """``tokens``: int64 [batch, context + 1], inputs and targets in one. Returns the fp32 mean cross-entropy."""
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        x = self.token_embedding(inputs) + self.position_embedding(torch.arange(inputs.shape[1], device=inputs.device))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))  # [batch, token, vocabulary]
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
