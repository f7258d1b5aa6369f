"""Train a small Transformer on Python's standard library with Lightning's DeepSpeedStrategy.

    python examples/lightning/train.py --devices 2

The strategy is Lightning's own. It demands CUDA devices; without them the class below takes the demand away.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader

sys.path.append(str(Path(__file__).parent.parent))
from source_code import PYTHON, VOCABULARY, SourceCode

CONTEXT, BATCH = 64, 32


class CpuStrategy(DeepSpeedStrategy):
    """DeepSpeedStrategy on devices without an index."""

    def setup_environment(self) -> None:
        super(DeepSpeedStrategy, self).setup_environment()

    def setup_distributed(self) -> None:
        self.set_world_ranks()
        self._init_deepspeed_distributed()


class ByteModel(LightningModule):
    """A causal Transformer over bytes."""

    def __init__(self, width: int = 128, layers: int = 3, steps: int = 300) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.position = nn.Embedding(CONTEXT, width)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.output = nn.Linear(width, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=tokens.device)
        hidden = self.embedding(tokens) + self.position.weight[:length]
        return self.output(self.blocks(hidden, mask=mask, is_causal=True))

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        tokens = batch["input_ids"]
        return nn.functional.cross_entropy(self(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        loss = self.loss(batch)
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], index: int) -> None:
        self.log("held_out_loss", self.loss(batch), sync_dist=True)

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=self.hparams.steps + 1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a small Transformer with Lightning and ZeRO.")
    parser.add_argument("--devices", type=int, default=2, help="ranks (default: %(default)s)")
    parser.add_argument("--stage", type=int, default=2, help="ZeRO stage (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--output", default="runs/lightning", help="where checkpoints go (default: %(default)s)")
    options = parser.parse_args()
    gpus = torch.cuda.is_available()
    torch.manual_seed(0)
    checkpoints = ModelCheckpoint(dirpath=options.output, filename="{step}", enable_version_counter=False)
    trainer = Trainer(
        accelerator="cuda" if gpus else "cpu",
        devices=options.devices,
        strategy=(DeepSpeedStrategy if gpus else CpuStrategy)(stage=options.stage),
        max_steps=options.steps,
        gradient_clip_val=1.0,
        callbacks=[checkpoints],
        logger=False,
        val_check_interval=options.steps,
    )
    training = DataLoader(SourceCode(PYTHON, CONTEXT), BATCH, shuffle=True, drop_last=True)
    held_out = DataLoader(SourceCode(PYTHON, CONTEXT, held_out=True, limit=512), BATCH)
    trainer.fit(ByteModel(steps=options.steps), training, held_out)
    trainer.print(f"held-out loss {trainer.callback_metrics['held_out_loss']:.3f} nats per byte")
    trainer.print(f"saved in {checkpoints.best_model_path}")


if __name__ == "__main__":
    main()
