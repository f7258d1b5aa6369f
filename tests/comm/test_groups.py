from __future__ import annotations

import logging

import torch
import torch.distributed as dist

import deepspeed
from deepspeed.comm.communicator import Communicator
from deepspeed.comm.log import living_logs
from deepspeed.utils import groups, logger


def dimensions() -> tuple[int, int, int, int, int]:
    return (
        dist.get_world_size(groups._get_data_parallel_group()),
        groups._get_data_parallel_world_size(),
        groups._get_data_parallel_rank(),
        groups._get_sequence_parallel_world_size(),
        groups._get_sequence_parallel_rank(),
    )


def test_all_ranks_are_data_parallel_and_none_share_a_sequence(ranks):
    assert ranks(2, dimensions) == [(2, 2, 0, 1, 0), (2, 2, 1, 1, 0)]


def summary_of_two_communicators() -> list[str]:
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logger.addHandler(handler)
    for log in living_logs():
        log.clear()
    communicators = Communicator(), Communicator()
    for communicator in communicators:
        communicator.all_reduce(torch.ones(1000)).wait()
    communicators[0].all_gather(torch.ones(500)).wait()
    deepspeed.comm.log_summary()
    logger.removeHandler(handler)
    return records


def test_the_summary_adds_up_what_all_communicators_exchanged(ranks):
    first, second = ranks(2, summary_of_two_communicators)
    (text,) = first
    rows = {line.split()[0]: line.split() for line in text.splitlines()[2:]}
    assert rows["all_reduce"][1:6] == ["4", "KB", "2", "8", "KB"]
    assert rows["all_gather"][1:6] == ["2", "KB", "1", "1", "KB"]
    assert second == []
