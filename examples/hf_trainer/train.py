"""Train a Llama of one million parameters on Python's standard library with Hugging Face's Trainer and ZeRO.

    deepspeed --num_gpus 2 examples/hf_trainer/train.py

Every option of transformers.TrainingArguments may follow, such as --max_steps 1000 or --bf16.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import HfArgumentParser, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

sys.path.append(str(Path(__file__).parent.parent))
from source_code import PYTHON, VOCABULARY, SourceCode, decoded, encoded

CONTEXT = 64
DEFAULTS = {
    "output_dir": "runs/hf_trainer",
    "deepspeed": str(Path(__file__).with_name("ds_config.json")),
    "use_cpu": not torch.cuda.is_available(),
    "per_device_train_batch_size": 16,
    "max_steps": 300,
    "learning_rate": 5e-3,
    "warmup_steps": 20,
    "logging_steps": 20,
    "eval_strategy": "steps",
    "eval_steps": 100,
    "save_steps": 100,
    "report_to": "none",
}
PROMPT = "def read_file(path):\n"


def make_model() -> LlamaForCausalLM:
    sizes = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4}
    tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "tie_word_embeddings": True}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=2 * CONTEXT, **sizes, **tokens))


def main() -> None:
    parser = HfArgumentParser(TrainingArguments)
    parser.set_defaults(**DEFAULTS)
    # The launcher tells each process its rank on the machine; the environment does so too.
    given = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    (arguments,) = parser.parse_args_into_dataclasses(given)
    set_seed(arguments.seed)
    trainer = Trainer(
        model=make_model(),
        args=arguments,
        train_dataset=SourceCode(PYTHON, CONTEXT),
        eval_dataset=SourceCode(PYTHON, CONTEXT, held_out=True, limit=512),
    )
    trainer.train(resume_from_checkpoint=arguments.resume_from_checkpoint)
    loss = trainer.evaluate()["eval_loss"]
    trainer.save_model()
    if trainer.is_world_process_zero():
        print(f"held-out loss {loss:.3f} nats per byte; the model is in {arguments.output_dir}")
        prompt = encoded(PROMPT).to(trainer.model.device)
        print(decoded(trainer.model.generate(prompt, max_new_tokens=100, do_sample=True, temperature=0.7)[0]))


if __name__ == "__main__":
    main()
