"""One node's part of a launch: ``python -m deepspeed.launcher.launch``, which ssh or pdsh starts on every node.

With ``--listen`` it reads what to do from its standard input: the name of a signal is passed on to the ranks, and the
end of the input says that the launcher is gone or has seen another node fail. Without it, the end of its parent (the
connection's ssh server) is a SIGTERM; with ``--peers`` the nodes then tell each other of a failure.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

from .arguments import add_program_arguments
from .errors import LaunchError
from .node import Attendant, Requests, run_ranks
from .program import Program, rank_commands
from .resources import accelerator_count
from .worker import end_with
from .world import Node, World, decode_world_info


def main(argv: Sequence[str] | None = None) -> int:
    """Run this node's ranks; the exit code is as `deepspeed.launcher.runner.main` says."""
    parser = argparse.ArgumentParser(prog="python -m deepspeed.launcher.launch", description=__doc__.splitlines()[0])
    parser.add_argument("--world_info", required=True, help="base64 of the hosts and their slots")
    parser.add_argument("--node_rank", type=int, required=True, help="this node's place among the hosts")
    parser.add_argument("--master_addr", required=True, help="address of rank 0")
    parser.add_argument("--master_port", type=int, required=True, help="port of rank 0")
    parser.add_argument("--listen", action="store_true", help="read from the standard input when to stop")
    parser.add_argument("--peers", action="store_true", help="learn from the other nodes when to stop")
    add_program_arguments(parser)
    options = parser.parse_args(argv)
    if not options.listen:
        end_with(os.getppid(), signal.SIGTERM)
    try:
        world = World(decode_world_info(options.world_info), options.master_addr, options.master_port)
        node = make_node(world, options.node_rank)
        attend = listen if options.listen else attend_peers(node) if options.peers else nullcontext
        return run_node(Program.from_options(options), node, chosen={}, attend=attend)
    except LaunchError as error:
        print(f"deepspeed: error: {error}", file=sys.stderr)
        return 2


def make_node(world: World, rank: int) -> Node:
    """This machine as node ``rank`` of the world; LaunchError where it is not one or lacks its accelerators."""
    if not 0 <= rank < len(world.pool):
        raise LaunchError(f"node rank {rank} is not among the {len(world.pool)} nodes; expected 0 to {len(world.pool) - 1}")
    count = accelerator_count()
    node = Node(world, rank, accelerators=count > 0)
    beyond = [slot for slot in node.slots if slot >= count]
    if count and beyond:
        raise LaunchError(
            f"{node.host}: more processes than slots: there are {count} accelerators and none for slot "
            f"{', '.join(map(str, beyond))}; ask for fewer, or correct the hostfile"
        )
    return node


def run_node(program: Program, node: Node, *, chosen: dict[str, str], attend: Attendant = nullcontext) -> int:
    """Run the node's ranks to their end, as `deepspeed.launcher.node.run_ranks` says."""
    commands = rank_commands(program, node, chosen)
    return run_ranks(commands, host=node.host, grace_seconds=program.grace_seconds, attend=attend)


def attend_peers(node: Node) -> Attendant:
    """The exchange with the other nodes, where there are any."""
    if len(node.world.pool) == 1:
        return nullcontext
    from .peers import Peers

    return Peers(node).attend


@contextmanager
def listen(requests: Requests) -> Iterator[None]:
    """Bring what the launcher writes to this node's standard input, which the ranks then do not get."""
    stream = os.dup(0)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)

    def read() -> None:
        while text := os.read(stream, 64):
            requests.signals.extend(signal.Signals[name] for name in text.decode().split())
        requests.elsewhere = "the launcher is gone, or has seen another node fail"

    threading.Thread(target=read, name="listen", daemon=True).start()
    yield


if __name__ == "__main__":
    sys.exit(main())
