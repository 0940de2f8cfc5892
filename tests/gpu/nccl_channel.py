"""The nccl channel over real NCCL: two processes on one GPU (two hosts to NCCL, through the loopback device), and with
two GPUs one process on each. Standalone: `python tests/gpu/nccl_channel.py`, with the repository's root in PYTHONPATH.
"""

from __future__ import annotations

import os
import random
import secrets
import signal
import sys
import time
from collections.abc import Iterator

import torch
from rows import Row, print_header, print_rows

from pdray.bench.peer_process import PeerProcess
from pdray.bench.pool_spec import PoolSpec
from pdray.bench.transfer import peer_environments, visible_gpus
from pdray.bench.transfer_peers import ReceivingPeer, SendingPeer

MIB = 2**20
TIMEOUT_S = 2.0
SLACK_S = 2.5  # an abort takes half a second, a put of the measurement some tenths
START_TIMEOUT_S = 60.0
NUM_BLOCKS = 601
SPEC = PoolSpec("receiver", 8, NUM_BLOCKS, 64 * 1024, b"", staging_bytes=16 * MIB, timeout_s=TIMEOUT_S)


class Pair:
    """A sender and a receiver in processes of their own. Epochs rise with every connection."""

    def __init__(self, environments: list[dict[str, str]], kind: str = "nccl") -> None:
        self.environments = [e | {"NCCL_DEBUG": os.environ.get("NCCL_DEBUG", "WARN")} for e in environments]
        self.spec = SPEC._replace(secret=secrets.token_bytes(32), kind=kind)
        self.epoch = 0
        self.rng = random.Random(1)
        self.start_sender()
        self.start_receiver()

    def start_sender(self) -> None:
        self.sender = PeerProcess(SendingPeer, self.spec._replace(name="sender"), environment=self.environments[0])
        self.sender.call("describe", timeout_s=START_TIMEOUT_S)

    def start_receiver(self) -> None:
        self.receiver = PeerProcess(ReceivingPeer, self.spec, environment=self.environments[1])
        self.port = self.receiver.call("start", timeout_s=START_TIMEOUT_S)

    def connect(self) -> float:
        self.epoch += 1
        offer = self.receiver.call("accept", "sender", self.epoch)
        seconds: float = self.sender.call("connect", "receiver", self.port, self.epoch, offer)
        return seconds

    def blocks(self, count: int) -> tuple[list[int], list[int]]:
        source, destination = (self.rng.sample(range(1, NUM_BLOCKS), count) for _ in range(2))
        return source, destination

    def arrives(self, *counts: int) -> list[bool]:
        """For puts of so many random blocks: whether just these arrived."""
        results = []
        for count in counts:
            seed, (source, destination) = self.rng.randrange(2**30), self.blocks(count)
            self.sender.call("fill", seed)
            self.receiver.call("aim", destination)
            self.sender.call("send", source, 0.0, 1)
            results.append(self.receiver.call("holds", seed, source, destination))
        return results

    def flood(self) -> None:
        """The sender pushes until something fails; its result is to be fetched."""
        source, destination = self.blocks(64)
        self.receiver.call("aim", destination)
        self.sender.post("send_until_it_fails", source, 30.0)
        time.sleep(1.0)

    def stop(self) -> None:
        self.sender.stop()
        self.receiver.stop()


def check_channel() -> Iterator[Row]:
    gpus = visible_gpus()
    yield from pair_rows("one GPU", peer_environments(gpus[:1]))
    if len(gpus) >= 2:
        yield from pair_rows("two GPUs", peer_environments(gpus))
    else:
        yield Row("nccl, two GPUs", "one GPU here", "two", None)


def pair_rows(name: str, environments: list[dict[str, str]]) -> Iterator[Row]:
    pair = Pair(environments)
    try:
        for check in (connects, receiver_dies, sender_dies, receiver_stops):
            yield from (row._replace(name=f"nccl, {name}: {row.name}") for row in check(pair))
    finally:
        pair.stop()


def connects(pair: Pair) -> Iterator[Row]:
    seconds = pair.connect()
    yield Row("connect", f"{seconds:.1f} s", "a probe arrived", True)
    right = pair.arrives(1, 17, 300, 600)
    yield Row("blocks of 64 KiB in 8 layers", f"{sum(right)} of {len(right)} puts right", "all", all(right))
    source, destination = pair.blocks(256)
    pair.receiver.call("aim", destination)
    rate = pair.sender.call("send", source, 2.0, 8)
    figure = f"{rate.num_bytes / rate.seconds / 1e9:.2f} GB/s, median {1e3 * rate.latency_s:.0f} ms a put of 128 MiB"
    yield Row("rate, 8 puts at once", figure, "-", True)
    pair.receiver.call("holds", 0, [1], [1])  # empties the pool


def receiver_dies(pair: Pair) -> Iterator[Row]:
    """SIGKILL in mid-transfer: the sender fails by its deadline, lives on, and another receiver takes over."""
    pair.flood()
    pair.receiver.kill()
    yield sender_failed(pair, "receiver killed")
    pair.start_receiver()
    yield goes_on(pair, "another receiver")


def sender_dies(pair: Pair) -> Iterator[Row]:
    pair.flood()
    pair.sender.kill()
    yield gave_up(pair, "sender killed")
    pair.start_sender()
    pair.receiver.call("holds", 0, [1], [1])
    yield goes_on(pair, "another sender")


def receiver_stops(pair: Pair) -> Iterator[Row]:
    """SIGSTOP: nothing is closed, nobody says anything."""
    pair.flood()
    os.kill(pair.receiver.pid, signal.SIGSTOP)
    try:
        yield sender_failed(pair, "receiver stopped")
    finally:
        os.kill(pair.receiver.pid, signal.SIGCONT)
    yield gave_up(pair, "receiver goes on")
    pair.receiver.call("holds", 0, [1], [1])
    yield goes_on(pair, "the same two")


def sender_failed(pair: Pair, name: str) -> Row:
    text, seconds = pair.sender.result("send_until_it_fails")
    works = pair.sender.call("works")
    limit = TIMEOUT_S + SLACK_S
    return Row(name, f"{seconds:.1f} s, GPU works: {works} ({text[:60]})", f"{limit} s", works and seconds <= limit)


def gave_up(pair: Pair, name: str) -> Row:
    """The receiver drops the channel with the session, or by its own deadline, and its GPU works."""
    started, limit = time.monotonic(), TIMEOUT_S + SLACK_S
    while True:
        _, senders, fatal = pair.receiver.call("status")
        seconds = time.monotonic() - started
        if not senders or seconds > limit:
            break
        time.sleep(0.05)
    works = pair.receiver.call("works")
    figure = f"{seconds:.1f} s, GPU works: {works} {fatal or ''}"
    return Row(name, figure, f"{limit} s", not senders and works and not fatal)


def goes_on(pair: Pair, name: str) -> Row:
    seconds = pair.connect()
    right = pair.arrives(40, 600)
    figure = f"connected in {seconds:.1f} s, {sum(right)} of {len(right)} puts right"
    return Row(f"{name}, epoch {pair.epoch}", figure, "all", all(right))


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("no GPU here: nothing was checked")
    print_header()
    sys.exit(not print_rows(check_channel()))
