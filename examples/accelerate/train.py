"""Train a recurrent network on Python's standard library in a loop of one's own, with Accelerate and ZeRO.

    accelerate launch --config_file examples/accelerate/config.yaml examples/accelerate/train.py

The same command goes on from the state that the last run saved.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from torch import Tensor, nn
from torch.utils.data import DataLoader

sys.path.append(str(Path(__file__).parent.parent))
from source_code import PYTHON, VOCABULARY, SourceCode, decoded, encoded

CONTEXT, BATCH = 64, 32
PROMPT = "def read_file(path):\n"


class Recurrent(nn.Module):
    """Logits of each next byte, (batch, length, 256), from bytes (batch, length)."""

    def __init__(self, width: int = 192) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.layers = nn.GRU(width, width, num_layers=2, batch_first=True)
        self.output = nn.Linear(width, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.output(self.layers(self.embedding(tokens))[0])


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    logits = model(tokens[:, :-1])
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a recurrent network with Accelerate and ZeRO.")
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps of this run (default: %(default)s)")
    parser.add_argument("--output", default="runs/accelerate", help="where the state goes (default: %(default)s)")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        # Without an accelerator device, this is how Accelerate learns that there are several ranks.
        PartialState(cpu=True)
    accelerator = Accelerator()
    torch.manual_seed(0)
    model = Recurrent()
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    training = DataLoader(SourceCode(PYTHON, CONTEXT), BATCH, shuffle=True, drop_last=True)
    held_out = DataLoader(SourceCode(PYTHON, CONTEXT, held_out=True, limit=512), BATCH)
    model, optimizer, training, held_out = accelerator.prepare(model, optimizer, training, held_out)
    state = Path(options.output, "state")
    if state.exists():
        accelerator.load_state(str(state))
    goal = model.global_steps + options.steps
    accelerator.print(f"from step {model.global_steps} to {goal} on {accelerator.num_processes} ranks")

    train(accelerator, model, optimizer, training, goal)
    accelerator.save_state(str(state))
    loss = evaluate(accelerator, model, held_out)
    accelerator.print(f"held-out loss {loss:.3f} nats per byte; the state is in {state}")
    if accelerator.is_main_process:
        print(continued(accelerator.unwrap_model(model), PROMPT, accelerator.device))


def train(accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer, batches: DataLoader, goal: int) -> None:
    while model.global_steps < goal:
        for batch in batches:
            with accelerator.accumulate(model):
                loss = loss_of(model, batch["input_ids"])
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients and model.global_steps % 50 == 0:
                accelerator.print(f"step {model.global_steps}: loss {loss.item():.3f}")
            if model.global_steps == goal:
                return


@torch.no_grad()
def evaluate(accelerator: Accelerator, model: nn.Module, batches: DataLoader) -> float:
    model.eval()
    losses = [accelerator.gather_for_metrics(loss_of(model, batch["input_ids"])).mean() for batch in batches]
    model.train()
    return torch.stack(losses).mean().item()


@torch.no_grad()
def continued(model: nn.Module, prompt: str, device: torch.device, length: int = 100) -> str:
    """``prompt`` and bytes drawn from what the model expects after it."""
    tokens = encoded(prompt).to(device)
    for _ in range(length):
        chances = (model(tokens)[:, -1] / 0.7).softmax(-1)
        tokens = torch.cat([tokens, torch.multinomial(chances, 1)], dim=1)
    return decoded(tokens[0])


if __name__ == "__main__":
    main()
