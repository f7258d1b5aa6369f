"""Which model fits: the arithmetic of its disk and memory."""

from __future__ import annotations

from dataclasses import dataclass

STATES = 16
"""Bytes on the disk for each parameter, fp32: itself, its gradient and Adam's two moments."""

CHECKPOINT = 12
"""Bytes of a checkpoint for each parameter: all of these but the gradient."""

SPARE = 1 << 30
"""Bytes of the disk that are left free."""


@dataclass(frozen=True)
class Shape:
    """A GPT of ``layers`` blocks of ``width``, with 12 * width^2 parameters each, and embeddings of ``tokens`` rows."""

    layers: int
    width: int
    tokens: int

    @property
    def parameters(self) -> int:
        """How many there are; biases and norms, 0.1 %, are not counted."""
        return 12 * self.layers * self.width**2 + self.tokens * self.width

    def __str__(self) -> str:
        return f"{self.parameters / 1e9:.2f} G parameters ({self.layers} layers of width {self.width})"


def shape_of(parameters: float, tokens: int) -> Shape:
    """A GPT of about so many parameters: its width is 64 times its layers, and 8192 at most."""
    width = 64
    while 12 * (width // 64) * width**2 < parameters and width < 8192:
        width += 64
    return Shape(max(1, round(parameters / (12 * width**2))), width, tokens)


@dataclass(frozen=True)
class Room:
    """Bytes that there are: ``disk`` for the states of all ranks, ``memory`` for a process, of which ``base`` is
    Python's and PyTorch's own and ``buffers`` the optimizer's."""

    disk: int
    memory: int
    base: int
    buffers: int

    def memory_needed(self, shape: Shape, batch_tokens: int) -> int:
        """The most that a process has in memory, about: parameters of two blocks, whole gradients of one and those of three
        on their way to the disk; what the optimizer has; the input of each block, and all that one computes."""
        block = 4 * 12 * shape.width**2
        largest = 4 * 4 * shape.width**2
        step = max(self.buffers, 3 * 4 * largest)
        activations = 4 * batch_tokens * shape.width * (shape.layers + 40)
        return self.base + activations + max(6 * block + largest, step)

    def refusal(self, shape: Shape, batch_tokens: int) -> str | None:
        """Why ``shape`` does not fit, with the numbers; None where it does."""
        disk, memory = shape.parameters * STATES + SPARE, self.memory_needed(shape, batch_tokens)
        if disk > self.disk:
            return (
                f"{shape} need {STATES} bytes each and {SPARE / 1e9:.1f} GB to spare, {disk / 1e9:.1f} GB; "
                f"the disk has {self.disk / 1e9:.1f} GB free"
            )
        if memory > self.memory:
            return f"{shape} need about {memory / 1e9:.1f} GB of memory; there are {self.memory / 1e9:.1f} GB"
        return None

    def largest(self, most: float, tokens: int, batch_tokens: int) -> Shape | None:
        """The largest shape of at most ``most`` parameters that fits; None where none does."""
        parameters = most
        while parameters > 1e4:
            shape = shape_of(parameters, tokens)
            if self.refusal(shape, batch_tokens) is None:
                return shape
            parameters *= 0.98
        return None

    def has_checkpoint(self, shape: Shape) -> bool:
        """Whether a checkpoint fits beside the states."""
        return shape.parameters * (STATES + CHECKPOINT) + SPARE <= self.disk
