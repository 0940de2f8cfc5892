"""KV between workers of one and of two ranks: real processes, over cuda_ipc on two GPUs, or four where they are there;
over nccl, which takes each GPU once, as many as there are GPUs for.
Standalone: `python tests/gpu/rank_pairs.py [KIND ...]`, with the repository's root in PYTHONPATH.
"""

from __future__ import annotations

import os
import random
import secrets
import signal
import sys
import time
from collections.abc import Iterator, Sequence

import torch
from rows import Row, print_header, print_rows

from pdray.bench.peer_process import PeerProcess
from pdray.bench.pool_spec import PoolSpec
from pdray.bench.transfer import RANK_HEADS, visible_gpus
from pdray.bench.transfer_ranks import receiving_peer, sending_peer
from pdray.errors import PdrayError

NUM_BLOCKS = 601
SPEC = PoolSpec("", 8, NUM_BLOCKS, 64 * 1024, b"", num_heads=RANK_HEADS)
KINDS = ("cuda_ipc", "nccl")
PAIRS = ((1, 2), (2, 1), (2, 2))
GIVE_UP_S = 10.0
Sizes = tuple[int, ...]
START_TIMEOUT_S = 120.0
SENDING_S = 60.0  # for whoever is killed in the midst of it
RECEIVER_GPUS = 2  # the first of the receivers', where there are four


class Ends:
    """Senders and receivers of so many ranks, by that number. Over nccl there is one of each, on ``theirs`` GPUs."""

    def __init__(self, gpus: list[str], theirs: list[str], kind: str, sizes: tuple[Sizes, Sizes]) -> None:
        self.spec = SPEC._replace(secret=secrets.token_bytes(32), kind=kind)
        self.gpus = gpus
        self.epoch = 0
        self.rng = random.Random(2)
        self.sizes = sizes
        self.senders = {number: self.start_sender(number) for number in sizes[0]}
        self.receivers = {number: self.start_receiver(number, theirs) for number in sizes[1]}
        for sender in self.senders.values():
            sender.call("describe", timeout_s=START_TIMEOUT_S)
        self.ports = {
            number: receiver.call("start", timeout_s=START_TIMEOUT_S) for number, receiver in self.receivers.items()
        }

    def start_sender(self, number: int) -> PeerProcess:
        spec = self.spec._replace(name=f"sender-{number}", num_ranks=number, num_peer_ranks=self.sizes[1][0])
        return PeerProcess(sending_peer, spec, environment=seeing(self.gpus[:number]))

    def start_receiver(self, number: int, gpus: list[str]) -> PeerProcess:
        """To their senders both are one, which has been started again."""
        spec = self.spec._replace(name="receiver", num_ranks=number, num_peer_ranks=self.sizes[0][0])
        return PeerProcess(receiving_peer, spec, environment=seeing(gpus[:number]))

    def connect(self, num_sources: int, num_targets: int) -> None:
        self.epoch += 1
        offer = self.receivers[num_targets].call("accept", f"sender-{num_sources}", self.epoch)
        self.senders[num_sources].call("connect", "receiver", self.ports[num_targets], self.epoch, offer)

    def blocks(self, count: int) -> list[list[int]]:
        """Source and destination."""
        return [self.rng.sample(range(1, NUM_BLOCKS), count) for _ in range(2)]

    def arrive(self, num_sources: int, num_targets: int, counts: list[int]) -> list[bool]:
        """For puts of so many random blocks: whether just these have come, with all heads, to all ranks."""
        sender, receiver = self.senders[num_sources], self.receivers[num_targets]
        right = []
        for count in counts:
            seed, (source, destination) = self.rng.randrange(2**30), self.blocks(count)
            sender.call("fill", seed)
            receiver.call("aim", destination)
            sender.call("send", source, 0.0, 1)
            right.append(receiver.call("holds", seed, source, destination))
        return right

    def stop(self) -> None:
        for peer in (*self.senders.values(), *self.receivers.values()):
            peer.stop()


def seeing(gpus: list[str]) -> dict[str, str]:
    return {"CUDA_VISIBLE_DEVICES": ",".join(gpus), "NCCL_DEBUG": os.environ.get("NCCL_DEBUG", "WARN")}


def check_rank_pairs(kinds: Sequence[str] = KINDS) -> Iterator[Row]:
    """Every put comes with all its heads; a rank that is killed in the midst of one touches only what it was lent."""
    gpus = visible_gpus()
    if len(gpus) < 2:
        return (yield Row("KV between ranks", "one GPU here", "-", None))
    for kind in kinds:
        if kind == "nccl":
            for pair in PAIRS:
                yield from over_nccl(gpus, *pair)
        else:
            yield from over_cuda_ipc(gpus)


def over_cuda_ipc(gpus: list[str]) -> Iterator[Row]:
    theirs = gpus[RECEIVER_GPUS:] if len(gpus) >= 2 * RECEIVER_GPUS else gpus
    ends = Ends(gpus, theirs, "cuda_ipc", ((1, 2), (1, 2)))
    try:
        for pair in PAIRS:
            yield from arrives(ends, *pair)
        yield from rank_dies(ends)
    finally:
        ends.stop()


def over_nccl(gpus: list[str], num_sources: int, num_targets: int) -> Iterator[Row]:
    """No rank shares its GPU with one that it has a communicator with."""
    if len(gpus) < num_sources + num_targets:
        name = f"KV of {num_sources} to {num_targets} ranks, nccl"
        return (yield Row(name, f"{len(gpus)} GPUs here", f"{num_sources + num_targets}", None))
    ends = Ends(gpus[: num_sources + num_targets], gpus[num_sources:], "nccl", ((num_sources,), (num_targets,)))
    try:
        yield from arrives(ends, num_sources, num_targets)
        if num_sources == num_targets:
            yield from rank_dies(ends)
    finally:
        ends.stop()


def arrives(ends: Ends, num_sources: int, num_targets: int) -> Iterator[Row]:
    ends.connect(num_sources, num_targets)
    right = ends.arrive(num_sources, num_targets, [1, 7, 40, 600])
    source, destination = ends.blocks(256)
    ends.receivers[num_targets].call("aim", destination)
    sender = ends.senders[num_sources]
    one, rate = sender.call("send", source[:1], 0.3, 1), sender.call("send", source, 0.5, 8)
    ends.receivers[num_targets].call("holds", 0, [1], [1])  # empties the pools
    name = f"KV of {num_sources} to {num_targets} ranks, {ends.spec.kind}, {len(ends.gpus)} GPUs"
    speed = f"{rate.num_bytes / rate.seconds / 1e9:.0f} GB/s; one block {1e3 * one.latency_s:.2f} ms until usable"
    yield Row(name, f"{sum(right)} of {len(right)} puts right, {speed}", "all", all(right))


def rank_dies(ends: Ends) -> Iterator[Row]:
    sender, receiver = ends.senders[2], ends.receivers[2]
    source, destination = ends.blocks(64)
    sender.call("fill", 3)
    receiver.call("aim", destination)
    (rank,) = sender.call("rank_pids")
    sender.post("send", source, SENDING_S, 4)
    time.sleep(1.0)
    os.kill(rank, signal.SIGKILL)
    try:
        sender.result("send")
        figure = "the sender goes on"
    except PdrayError as error:
        figure = str(error)
    works, right = receiver.call("works"), True
    if ends.spec.kind == "cuda_ipc":
        right = receiver.call("holds", 3, source, destination)
        figure += f"; only its blocks changed: {right}"
    else:  # what was granted, and did not come, is whatever lay in the slots
        right = given_up(receiver)
        figure += f"; given up: {right}"
        receiver.call("holds", 3, source, destination)
    sender.stop()
    ends.senders[2] = ends.start_sender(2)
    ends.senders[2].call("describe", timeout_s=START_TIMEOUT_S)
    ends.connect(2, 2)
    again = ends.arrive(2, 2, [40])
    figure += f", GPU works: {works}, another one: {again[0]}"
    held = "ended in send" in figure and works and right and all(again)
    yield Row(f"rank of a sender killed, {ends.spec.kind}", figure, "ended, True", held)


def given_up(receiver: PeerProcess) -> bool:
    """Whether no channel is open there any more, soon."""
    deadline = time.monotonic() + GIVE_UP_S
    while receiver.call("status")[1]:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("no GPU here: nothing was checked")
    print_header()
    sys.exit(not print_rows(check_rank_pairs(sys.argv[1:] or KINDS)))
