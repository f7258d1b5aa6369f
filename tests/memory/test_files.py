from __future__ import annotations

import pytest

from deepspeed.config import ConfigError, load_config
from deepspeed.config.offload import AioConfig
from deepspeed.memory.files import aio_section, queue_options
from deepspeed.native.file_engine import QueueOptions

BATCH = {"train_micro_batch_size_per_gpu": 1}


def test_the_section_aio_says_how_files_are_read_and_written() -> None:
    section = {
        "block_size": 262144,
        "queue_depth": 16,
        "intra_op_parallelism": 2,
        "single_submit": True,
        "overlap_events": False,
    }
    options = queue_options(load_config({**BATCH, "aio": section}, world_size=1).aio)
    assert options == QueueOptions(262144, 16, 2, single_submit=True, overlap_events=False)
    assert queue_options(AioConfig(**aio_section(options))) == options
    assert queue_options(AioConfig()) == QueueOptions()


@pytest.mark.parametrize(
    ("section", "problem"),
    [
        ({"use_gds": True}, r"aio\.use_gds: GPUDirect storage is not built yet; set it to false"),
        ({"queue_depth": 0}, r"aio\.queue_depth"),
        ({"block_size": 2 << 30}, r"aio\.block_size"),
    ],
)
def test_what_cannot_be_honoured_is_an_error_that_names_the_key(section: dict[str, int], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        load_config({**BATCH, "aio": section}, world_size=1)
