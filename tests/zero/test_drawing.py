"""Large parameters under ``zero.Init``: drawn fast, kept by each rank for itself where all have the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deepspeed
from deepspeed.native import available, draws
from deepspeed.zero.construction import COMPARED_NBYTES, ModuleSharder
from tests.parity import assert_equal

WIDTH = 520
"""Of a square parameter that is compared, and divides neither by three ranks nor by the kernel's 16 normal samples at once."""

assert 4 * WIDTH * WIDTH > COMPARED_NBYTES

CONFIG = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 1000}}


class Pretrained(nn.Module):
    """Draws all weights again when it is complete, as language models do; the head is tied."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(600, WIDTH, padding_idx=1)
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(2)])
        self.norm = nn.RMSNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 600, bias=False)
        self.head.weight = self.embedding.weight
        self.apply(self._init_weights)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            module.weight.data.normal_(mean=0.0, std=0.02)
        if isinstance(module, nn.Embedding):
            module.weight.data[module.padding_idx].zero_()


class Initialized(nn.Module):
    """By functions that compute with what they drew, and draw buffers and numbers besides."""

    def __init__(self) -> None:
        super().__init__()
        self.truncated = nn.Linear(WIDTH, WIDTH)
        nn.init.trunc_normal_(self.truncated.weight, std=0.02)
        self.orthogonal = nn.Linear(WIDTH, WIDTH)
        nn.init.orthogonal_(self.orthogonal.weight)
        self.other = nn.Parameter(torch.randn(WIDTH, WIDTH) * 0.1)
        self.transposed = nn.Parameter(torch.empty(WIDTH, WIDTH).uniform_(-1, 1).t())
        self.register_buffer("projection", torch.empty(90, 90).normal_())
        nn.init.normal_(self.truncated.weight[: WIDTH // 2], std=float(torch.rand(())))
        nn.init.xavier_uniform_(self.orthogonal.weight[:, : WIDTH // 2])
        nn.init.uniform_(self.other[WIDTH // 2], generator=torch.Generator().manual_seed(3))


MODELS: dict[str, Callable[[], nn.Module]] = {"pretrained": Pretrained, "initialized": Initialized}


def constructed(name: str, seeds: int, narrow: bool = False) -> tuple[dict[str, Tensor], Tensor, Counter[str]]:
    """The values, what the generator gives next, and how the slices came to this rank. Ranks have one of ``seeds`` seeds."""
    torch.manual_seed(5 + deepspeed.comm.get_rank() % seeds)
    ways: Counter[str] = Counter()
    original = {way: getattr(ModuleSharder, way) for way in ("_cut", "_scatter")}
    for way, function in original.items():

        def counted(*args: Any, way: str = way, function: Any = function) -> Any:
            ways[way] += args[1].nbytes >= COMPARED_NBYTES
            return function(*args)

        setattr(ModuleSharder, way, counted)
    try:
        with deepspeed.zero.Init(config_dict_or_path={**CONFIG, "bf16": {"enabled": narrow}}):
            model = MODELS[name]()
    finally:
        for way, function in original.items():
            setattr(ModuleSharder, way, function)
    following = torch.rand(3)
    with deepspeed.zero.GatheredParameters(model):
        return {key: value.detach().clone() for key, value in model.state_dict().items()}, following, ways


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("size, seeds", [(2, 1), (3, 1), (2, 2), (3, 2)])
def test_values_are_those_of_plain_construction_and_are_sent_only_where_they_differ(ranks, name, size, seeds):
    torch.manual_seed(5)
    plain, following = MODELS[name](), torch.rand(3)
    for rank, (found, found_following, ways) in enumerate(ranks(size, constructed, name, seeds)):
        if seeds > 1:
            found.pop("projection", None)  # A buffer is each rank's own until there is an engine.
        assert_equal(found, {key: value.detach() for key, value in plain.state_dict().items() if key in found})
        assert torch.equal(found_following, following) == (rank % seeds == 0)
        assert set(+ways) == {"_cut" if seeds == 1 and available() else "_scatter"}


def test_in_a_narrow_dtype_they_are_those_of_plain_construction_converted(ranks):
    torch.manual_seed(5)
    plain = Pretrained()
    for found, _, _ in ranks(2, constructed, "pretrained", 1, True):
        assert_equal(found, {key: value.detach().bfloat16() for key, value in plain.state_dict().items()})


def drawn_within() -> list[bool]:
    drawn: list[bool] = []
    fill = draws._fill

    def counted(*args: Any) -> bool:
        drawn.append(fill(*args))
        return drawn[-1]

    draws._fill = counted
    try:
        with deepspeed.zero.Init(config_dict_or_path=CONFIG):
            nn.Linear(WIDTH, WIDTH)
            torch.empty(WIDTH, WIDTH).normal_(generator=torch.Generator())
            torch.empty(WIDTH, WIDTH, device="meta").normal_()
        nn.Linear(WIDTH, WIDTH)
    finally:
        draws._fill = fill
    return drawn


@pytest.mark.skipif(not available(), reason="without the core torch draws")
def test_the_native_kernel_draws_within_the_context_alone_and_for_the_default_generator(ranks):
    weight, bias, on_meta = ranks(1, drawn_within)[0]
    assert (weight, bias, on_meta) == (True, False, False)


def written_elsewhere() -> Tensor:
    rank = deepspeed.comm.get_rank()
    torch.manual_seed(5)
    with deepspeed.zero.Init(config_dict_or_path=CONFIG):
        linear = nn.Linear(WIDTH, WIDTH)
        raw = torch.empty(WIDTH, WIDTH).uniform_()
        raw.numpy()[-1, -1] = rank
        model = nn.ModuleList([linear, nn.ParameterList([nn.Parameter(raw)])])
    with deepspeed.zero.GatheredParameters(model):
        return model[1][0].detach().clone()


def test_a_value_that_one_rank_wrote_past_torch_is_that_of_the_first(ranks):
    for found in ranks(2, written_elsewhere):
        assert found[-1, -1] == 0
