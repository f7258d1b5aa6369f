"""Adapt a model that reads Python to C++ with low-rank adapters, by PEFT, Hugging Face's Trainer and ZeRO.

    deepspeed --num_gpus 2 examples/hf_trainer/train.py
    deepspeed --num_gpus 2 examples/lora/train.py

The first trains the model; the second trains adapters on PyTorch's C++ headers and leaves the model as it is.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import HfArgumentParser, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

sys.path.append(str(Path(__file__).parent.parent))
from source_code import HEADERS, SourceCode

CONTEXT = 64
DEFAULTS = {
    "output_dir": "runs/lora",
    "deepspeed": str(Path(__file__).with_name("ds_config.json")),
    "use_cpu": not torch.cuda.is_available(),
    "per_device_train_batch_size": 16,
    "max_steps": 100,
    "learning_rate": 5e-3,
    "logging_steps": 20,
    "save_steps": 50,
    "report_to": "none",
}


@dataclass
class Options:
    base: str = field(default="runs/hf_trainer", metadata={"help": "the folder of the model to adapt"})
    rank: int = field(default=8, metadata={"help": "of the adapters"})


def main() -> None:
    parser = HfArgumentParser((TrainingArguments, Options))
    parser.set_defaults(**DEFAULTS)
    # The launcher tells each process its rank on the machine; the environment does so too.
    given = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    arguments, options = parser.parse_args_into_dataclasses(given)
    if not Path(options.base, "config.json").exists():
        raise SystemExit(f"--base {options.base}: there is no model; examples/hf_trainer/train.py makes one")
    set_seed(arguments.seed)
    base = LlamaForCausalLM.from_pretrained(options.base)
    layers = ["q_proj", "v_proj", "up_proj", "down_proj"]
    model = get_peft_model(base, LoraConfig(r=options.rank, lora_alpha=2 * options.rank, target_modules=layers))
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=SourceCode(HEADERS, CONTEXT),
        eval_dataset=SourceCode(HEADERS, CONTEXT, held_out=True, limit=512),
    )
    if trainer.is_world_process_zero():
        model.print_trainable_parameters()
    trainer.train(resume_from_checkpoint=arguments.resume_from_checkpoint)
    adapted = trainer.evaluate()["eval_loss"]
    with model.disable_adapter():
        before = trainer.evaluate()["eval_loss"]
    trainer.save_model()
    if trainer.is_world_process_zero():
        print(f"held-out loss on C++: {before:.3f} nats per byte without the adapters, {adapted:.3f} with them")
        print(f"the adapters are in {arguments.output_dir}")


if __name__ == "__main__":
    main()
