"""The cuda_ipc channel between real processes: on one GPU, and with two GPUs between them. Standalone:
`python tests/gpu/cuda_ipc_channel.py`, with the repository's root in PYTHONPATH.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator

import torch
from nccl_channel import START_TIMEOUT_S, Pair
from rows import Row, print_header, print_rows

from pdray.bench.transfer import visible_gpus

FLOOD_S = 3.0


def check_cuda_ipc() -> Iterator[Row]:
    """One GPU that two processes share, then two GPUs where they are there."""
    gpus = visible_gpus()
    yield from check_pair("one GPU", [gpus[0], gpus[0]])
    if len(gpus) < 2:
        yield Row("cuda_ipc, two GPUs", "one GPU here", "-", None)
    else:
        yield from check_pair("two GPUs", gpus[:2])


def check_pair(name: str, gpus: list[str]) -> Iterator[Row]:
    pair = Pair([{"CUDA_VISIBLE_DEVICES": gpu} for gpu in gpus], "cuda_ipc")
    try:
        for check in (arrives, receiver_dies, sender_dies, receiver_stops):
            for row in check(pair):
                yield row._replace(name=f"cuda_ipc, {name}: {row.name}")
    finally:
        pair.stop()


def arrives(pair: Pair) -> Iterator[Row]:
    yield connected(pair, "puts")
    source, destination = pair.blocks(256)
    pair.receiver.call("aim", destination)
    rate = pair.sender.call("send", source, 1.0, 8)
    one = pair.sender.call("send", source[:1], 0.5, 1)
    figure = f"{rate.num_bytes / rate.seconds / 1e9:.0f} GB/s; one block {1e3 * one.latency_s:.2f} ms until usable"
    yield Row("rate", figure, "-", True)
    pair.receiver.call("holds", 0, [1], [1])  # empties the pool


def connected(pair: Pair, name: str) -> Row:
    """Connects, in the next epoch; puts of all sizes arrive where they should, and nowhere else."""
    seconds = pair.connect()
    right = pair.arrives(1, 7, 40, 600)
    figure = f"connected in {seconds:.2f} s, {sum(right)} of {len(right)} right"
    return Row(f"{name}, epoch {pair.epoch}", figure, "all", all(right))


def flood(pair: Pair) -> list[list[int]]:
    """The sender writes for FLOOD_S; returns source and destination when it is in the midst of it."""
    source, destination = pair.blocks(64)
    pair.sender.call("fill", 3)
    pair.receiver.call("holds", 0, [1], [1])
    pair.receiver.call("aim", destination)
    pair.sender.post("send", source, FLOOD_S, 4)
    time.sleep(FLOOD_S / 3)
    return [source, destination]


def receiver_dies(pair: Pair) -> Iterator[Row]:
    """SIGKILL in mid-transfer: writes end in memory that is nobody's any more, and another receiver takes over."""
    flood(pair)
    pair.receiver.kill()
    rate = pair.sender.result("send")
    works = pair.sender.call("works")
    yield Row("receiver killed", f"{rate.num_puts} puts ended, GPU works: {works}", "all, works", works)
    pair.start_receiver()
    yield connected(pair, "another receiver")


def sender_dies(pair: Pair) -> Iterator[Row]:
    """SIGKILL in mid-transfer: only blocks that it was lent have changed."""
    source, destination = flood(pair)
    pair.sender.kill()
    works = pair.receiver.call("works")
    right = pair.receiver.call("holds", 3, source, destination, timeout_s=START_TIMEOUT_S)
    yield Row("sender killed", f"GPU works: {works}, pool right: {right}", "works, right", works and right)
    pair.start_sender()
    yield connected(pair, "another sender")


def receiver_stops(pair: Pair) -> Iterator[Row]:
    """SIGSTOP: writes go on, and are there when it goes on."""
    source, destination = flood(pair)
    os.kill(pair.receiver.pid, signal.SIGSTOP)
    rate = pair.sender.result("send")
    os.kill(pair.receiver.pid, signal.SIGCONT)
    right = pair.receiver.call("holds", 3, source, destination)
    figure = f"{rate.num_puts} puts of {rate.seconds:.1f} s ended, pool right: {right}"
    yield Row("receiver stopped", figure, "right", right and rate.seconds < FLOOD_S + 1)


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("no GPU here: nothing was checked")
    print_header()
    sys.exit(not print_rows(check_cuda_ipc()))
