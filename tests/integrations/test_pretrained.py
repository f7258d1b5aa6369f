"""Models of Transformers that are constructed, loaded and resized in shards, as ``from_pretrained`` does under stage 3."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.integrations import HfDeepSpeedConfig

import deepspeed
from deepspeed.memory.heap import FreedMemory
from deepspeed.zero.construction import FREED_NBYTES

from .common import assert_same, isolated, weights

VOCABULARY = 67

SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}

CONFIGS: dict[str, tuple[type[Any], Callable[[], Any]]] = {
    "llama": (
        LlamaForCausalLM,
        lambda: LlamaConfig(**SMALL, num_key_value_heads=1, bos_token_id=0, eos_token_id=1),
    ),
    "gpt2": (
        GPT2LMHeadModel,
        lambda: GPT2Config(
            vocab_size=VOCABULARY, n_positions=24, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=1
        ),
    ),
    "bert": (
        BertForMaskedLM,
        lambda: BertConfig(**SMALL, max_position_embeddings=24),
    ),
    "t5": (
        T5ForConditionalGeneration,
        lambda: T5Config(
            vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0
        ),
    ),
    "mixtral": (
        MixtralForCausalLM,
        lambda: MixtralConfig(**SMALL, num_key_value_heads=1, num_local_experts=3),
    ),
}
each_model = pytest.mark.parametrize("name", CONFIGS)


def ds_config(**more: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 20, "stage3_prefetch_bucket_size": "auto"},
        **more,
    }


def plain(name: str, seed: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    make, config = CONFIGS[name]
    return make(config()).eval()


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def is_sharded(model: nn.Module) -> bool:
    released = deepspeed.zero.ZeroParamStatus.NOT_AVAILABLE
    return all((p.ds_status is released) == (p.ds_numel > 20) for p in model.parameters())


def batch() -> dict[str, Tensor]:
    tokens = torch.randint(2, 60, (2, 8), generator=torch.Generator().manual_seed(1))
    return {"input_ids": tokens, "labels": tokens}


@isolated
def loaded(name: str, folder: str) -> tuple[dict[str, Tensor], float, float]:
    """The weights, and the loss before and after a step."""
    alive = HfDeepSpeedConfig(ds_config())
    torch.manual_seed(40 + deepspeed.comm.get_rank())
    model = CONFIGS[name][0].from_pretrained(folder).eval()
    assert alive and is_sharded(model)
    found = weights(model)
    engine = deepspeed.initialize(model=model, config=ds_config())[0]
    losses = []
    for _ in range(2):
        loss = engine(**batch()).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    engine.destroy()
    return found, losses[0], losses[1]


@each_model
def test_pretrained_weights_are_loaded_into_shards_and_train(ranks, name, tmp_path):
    model = plain(name)
    model.save_pretrained(tmp_path)
    expected = model(**batch()).loss
    expected.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    after = model(**batch()).loss.item()
    for found, first, second in ranks(2, loaded, name, str(tmp_path)):
        assert_same(found, state(CONFIGS[name][0].from_pretrained(tmp_path)))
        assert first == pytest.approx(expected.item(), rel=1e-5)
        assert second == pytest.approx(after, rel=1e-4)


@isolated
def from_config(name: str, precision: str) -> tuple[dict[str, Tensor], bool]:
    alive = HfDeepSpeedConfig(ds_config(bf16={"enabled": precision == "bf16"}))
    torch.manual_seed(7 + deepspeed.comm.get_rank())
    make, config = CONFIGS[name]
    model = make._from_config(config())
    assert alive and is_sharded(model)
    return weights(model), model.get_input_embeddings().weight is model.get_output_embeddings().weight


@each_model
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_model_made_from_its_configuration_is_initialized_in_shards_and_tied(ranks, name, precision):
    plain_model = plain(name)
    tied = plain_model.get_input_embeddings().weight is plain_model.get_output_embeddings().weight
    results = ranks(2, from_config, name, precision)
    assert_same(results[1][0], results[0][0])
    found, is_tied = results[0]
    assert is_tied == tied
    for key, value in state(plain_model).items():
        assert found[key].shape == value.shape
        if value.is_floating_point() and value.numel() > 60 and value.std() > 0:
            assert found[key].float().std() == pytest.approx(value.std().item(), rel=0.35), key


@isolated
def resized(name: str, folder: str, tokens: int, mean: bool) -> tuple[dict[str, Tensor], bool, bool, list[int]]:
    alive = HfDeepSpeedConfig(ds_config())
    torch.manual_seed(1 + deepspeed.comm.get_rank())
    model = CONFIGS[name][0].from_pretrained(folder)
    model.resize_token_embeddings(tokens, mean_resizing=mean)
    assert alive
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    engine = deepspeed.initialize(model=model, config=ds_config())[0]
    found = weights(model)
    loss = engine(**batch()).loss
    engine.backward(loss)
    engine.step()
    engine.destroy()
    return found, tied, bool(loss.isfinite()), [model.config.vocab_size, model.get_input_embeddings().num_embeddings]


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5"])
@pytest.mark.parametrize("tokens, mean", [(VOCABULARY + 5, True), (VOCABULARY + 5, False), (VOCABULARY, True), (60, False)])
def test_embeddings_are_resized_in_shards(ranks, name, tokens, mean, tmp_path):
    model = plain(name)
    model.save_pretrained(tmp_path)
    before = state(model)
    was_tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    results = ranks(2, resized, name, str(tmp_path), tokens, mean)
    assert_same(results[1][0], results[0][0])
    for found, tied, finite, sizes in results:
        assert tied == was_tied and finite and sizes == [tokens, tokens]
        for key, value in before.items():
            # Nothing but what has a row per token changes, and of that only the new rows.
            kept = min(tokens, VOCABULARY) if value.shape[0] == VOCABULARY else value.shape[0]
            assert torch.equal(found[key][:kept], value[:kept]), key


@isolated
def with_missing_keys(folder: str) -> tuple[dict[str, Tensor], set[str]]:
    alive = HfDeepSpeedConfig(ds_config())
    torch.manual_seed(1 + deepspeed.comm.get_rank())
    model, report = BertForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert alive and is_sharded(model)
    return weights(model), set(report["missing_keys"])


def test_parameters_that_a_checkpoint_lacks_are_initialized_the_same_on_all_ranks(ranks, tmp_path):
    model = plain("bert")
    model.save_pretrained(tmp_path)
    before = state(model)
    results = ranks(2, with_missing_keys, str(tmp_path))
    assert_same(results[1][0], results[0][0])
    found, missing = results[0]
    assert {"classifier.weight", "classifier.bias"} <= missing
    assert 0.01 < found["classifier.weight"].std() < 0.04 and not found["classifier.bias"].any()
    for key, value in found.items():
        assert key in missing or torch.equal(value, before[key]), key


@isolated
def with_another_size(folder: str) -> str:
    alive = HfDeepSpeedConfig(ds_config())
    # Only the first rank reads the values.
    with pytest.raises(RuntimeError) if deepspeed.comm.get_rank() == 0 else nullcontext() as caught:
        LlamaForCausalLM.from_pretrained(folder)
    assert alive
    return str(caught.value) if caught else ""


def test_a_weight_of_another_size_is_an_error_that_names_it(ranks, tmp_path):
    plain("llama").save_pretrained(tmp_path)
    file = Path(tmp_path) / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] = torch.ones(15)
    save_file(tensors, file, metadata={"format": "pt"})
    message = ranks(2, with_another_size, str(tmp_path))[0]
    assert "model.norm.weight" in message


@isolated
def in_bf16(folder: str) -> tuple[dict[str, Tensor], torch.dtype]:
    alive = HfDeepSpeedConfig(ds_config(bf16={"enabled": True}))
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert alive
    return weights(model), model.model.rotary_emb.inv_freq.dtype


def test_weights_come_in_the_asked_precision_and_tables_of_positions_keep_theirs(ranks, tmp_path):
    model = plain("llama")
    model.save_pretrained(tmp_path)
    for found, positions in ranks(2, in_bf16, str(tmp_path)):
        assert_same(found, {key: value.bfloat16() for key, value in state(model).items()})
        assert positions == torch.float32


@isolated
def saved_again(folder: str, target: str) -> bool:
    alive = HfDeepSpeedConfig(ds_config())
    model = GPT2LMHeadModel.from_pretrained(folder)
    engine = deepspeed.initialize(model=model, config=ds_config())[0]
    whole = engine._zero3_consolidated_16bit_state_dict()
    assert alive
    if deepspeed.comm.get_rank() == 0:
        model.save_pretrained(target, state_dict=whole)
    with pytest.raises(RuntimeError, match="sharded by ZeRO stage 3"):
        model.save_pretrained(f"{target}-empty")
    engine.destroy()
    return True


def test_a_sharded_model_is_saved_from_its_whole_state_dict_and_not_by_itself(ranks, tmp_path):
    model = plain("gpt2")
    model.save_pretrained(tmp_path / "first")
    ranks(2, saved_again, str(tmp_path / "first"), str(tmp_path / "second"))
    assert_same(state(GPT2LMHeadModel.from_pretrained(tmp_path / "second")), state(model))


def anonymous_bytes() -> int:
    """This process's resident memory that is no file's: a checkpoint that is mapped into memory does not count."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")) * 1024


@isolated
def peak_while_loading(folder: str) -> tuple[int, int]:
    """How far this process's memory rises while it loads a model, and the bytes of that model."""
    alive = HfDeepSpeedConfig(ds_config(bf16={"enabled": True}))
    FreedMemory(0).give_back()
    before = anonymous_bytes()
    peak, loaded = before, Event()

    def watch() -> None:
        nonlocal peak
        while not loaded.wait(0.002):
            peak = max(peak, anonymous_bytes())

    watcher = Thread(target=watch)
    watcher.start()
    try:
        model = LlamaForCausalLM.from_pretrained(folder)
    finally:
        loaded.set()
        watcher.join()
    assert alive and is_sharded(model)
    return peak - before, sum(p.ds_numel * p.element_size() for p in model.parameters())


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_a_rank_needs_its_shard_and_a_layer_to_load_a_model_of_several_files(ranks, tmp_path):
    sizes = {"vocab_size": 512, "hidden_size": 768, "intermediate_size": 2048, "num_attention_heads": 8}
    config = LlamaConfig(**sizes, num_hidden_layers=12, bos_token_id=0, eos_token_id=1)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    model.save_pretrained(tmp_path, max_shard_size="40MB")
    del model
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    for rise, whole in ranks(2, peak_while_loading, str(tmp_path)):
        assert rise < whole / 2 + 4 * layer + FREED_NBYTES  # that of one that read all would be 1.5 wholes
