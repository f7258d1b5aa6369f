"""The nodes of a launch as one value: who has which ranks, and where rank 0 listens."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from dataclasses import dataclass

from .errors import LaunchError


@dataclass(frozen=True)
class World:
    """All ranks of a launch. ``pool`` maps each host, in order of rank, to the slots of it that get one."""

    pool: dict[str, list[int]]
    master_addr: str
    master_port: int

    @property
    def size(self) -> int:
        """Ranks on all nodes."""
        return sum(len(slots) for slots in self.pool.values())

    def node_of(self, rank: int) -> int:
        """The place, among the hosts, of the one that has ``rank``."""
        last = 0
        for place, slots in enumerate(self.pool.values()):
            last += len(slots)
            if rank < last:
                return place
        raise LaunchError(f"rank {rank} is not among the {self.size} ranks of {', '.join(self.pool)}")


@dataclass(frozen=True)
class Node:
    """One node of a world."""

    world: World
    rank: int
    accelerators: bool

    @property
    def host(self) -> str:
        """This node's name in the pool."""
        return list(self.world.pool)[self.rank]

    @property
    def slots(self) -> list[int]:
        """The slots of this node that get a rank."""
        return self.world.pool[self.host]

    @property
    def first_rank(self) -> int:
        """The global rank of this node's local rank 0."""
        return sum(len(slots) for slots in list(self.world.pool.values())[: self.rank])


def encode_world_info(world_info: Mapping[str, list[int]]) -> str:
    """Active resources as URL-safe base64 of JSON, so that no shell touches them on their way to another node."""
    return base64.urlsafe_b64encode(json.dumps(dict(world_info)).encode()).decode()


def decode_world_info(text: str) -> dict[str, list[int]]:
    """The active resources in what `encode_world_info` made; LaunchError where it did not."""
    try:
        pool = json.loads(base64.urlsafe_b64decode(text.encode()))
        return {str(host): [int(slot) for slot in slots] for host, slots in pool.items()}
    except (binascii.Error, ValueError, AttributeError, TypeError) as error:
        raise LaunchError(f"--world_info {text!r} is not what the deepspeed command makes: {error}") from error
