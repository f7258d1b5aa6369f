"""A small GPT in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import skip_init


class Block(nn.Module):
    """Pre-norm attention and feed-forward."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = _linear(width, 3 * width)
        self.projection = _linear(width, width)
        self.feed_norm = nn.LayerNorm(width)
        self.feed = nn.Sequential(_linear(width, 4 * width), nn.GELU(), _linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """``x`` is (batch, length, width)."""
        batch, length, width = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2], is_causal=True)
        x = x + self.projection(attended.transpose(1, 2).reshape(batch, length, width))
        return x + self.feed(self.feed_norm(x))


class GPT(nn.Module):
    """Token and position embeddings, blocks, and an output head tied to the token embedding."""

    def __init__(self, *, vocabulary: int, context: int, layers: int, width: int, heads: int):
        super().__init__()
        self.context = context
        self.tokens = _embedding(vocabulary, width)
        self.positions = _embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits (batch, length, vocabulary) of ``tokens`` (batch, length), or the mean loss where targets are given."""
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return logits if targets is None else F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


@torch.no_grad()
def generate(model: GPT, tokens: list[int], count: int) -> list[int]:
    """Continue ``tokens`` by ``count`` sampled ones (temperature 0.8, of the 40 likeliest)."""
    device = model.tokens.weight.device
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        window = torch.tensor([tokens[-model.context :]], device=device)
        logits = model(window)[0, -1].float().cpu() / 0.8
        best = logits.topk(min(40, logits.numel()))
        choice = torch.multinomial(best.values.softmax(-1), 1, generator=generator)
        tokens = [*tokens, int(best.indices[choice])]
    return tokens


def _linear(inputs: int, outputs: int) -> nn.Linear:
    """A layer that is initialized once, when it is made: under ``zero.Init`` it may be on a disk a moment later."""
    layer = skip_init(nn.Linear, inputs, outputs)
    nn.init.normal_(layer.weight, std=0.02)
    nn.init.zeros_(layer.bias)
    return layer


def _embedding(count: int, width: int) -> nn.Embedding:
    layer = skip_init(nn.Embedding, count, width)
    nn.init.normal_(layer.weight, std=0.02)
    return layer
