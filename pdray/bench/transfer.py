"""`pdray bench transfer`: how fast KV blocks get from one worker's pool into another's, scattered to scattered.

Each row pushes the same number of blocks of one group of layers per put, from random places of one pool to random
places of the other: alone (latency), and several at once (rate). What arrived is compared with what was sent.

On GPUs it is the channel that two workers would get (--channel: another) between two processes, and the share of what
cudaMemcpyPeer reaches between the two; with one GPU they share it, and nccl goes through the loopback device, which
says nothing about speed. On CPU it is the object store.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import secrets
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pdray.bench.peer_process import PeerProcess
from pdray.errors import ConfigError, PdrayError

if TYPE_CHECKING:
    from pdray.bench.pool_spec import PoolSpec
    from pdray.bench.sender_death import Death
    from pdray.bench.transfer_peers import Rate

MIB = 2**20
START_TIMEOUT_S = 120.0
RANK_HEADS = 8  # of keys and values, where several ranks share them
GPU_KINDS = ["cuda_ipc", "nccl"]

# (source blocks, destination blocks, seconds, puts at once) -> rate
Send = Callable[[list[int], list[int], float, int], "Rate"]
# (seed, source blocks, destination blocks) -> whether exactly that has arrived; then the pool is empty again
Check = Callable[[int, list[int], list[int]], bool]


class Way(NamedTuple):
    """One way from pool to pool. peer_copy: bytes per second of one large copy between the devices, if it is known."""

    name: str
    send: Send
    holds: Check
    peer_copy: float | None = None


class TransferRow(NamedTuple):
    """Attributes:
    block_kib: of one layer. put_mib: of one put. share: of cudaMemcpyPeer's rate.
    """

    block_kib: int
    num_blocks: int
    put_mib: float
    latency_ms: float
    gb_per_s: float
    share: float | None
    is_right: bool


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `pdray bench transfer`."""
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="default: CUDA where it is")
    parser.add_argument(
        "--channel", nargs="+", choices=GPU_KINDS, default=GPU_KINDS[:1], help="on GPUs (default: cuda_ipc)"
    )
    parser.add_argument(
        "--block-kib", type=int, nargs="+", default=[16, 64], help="a block's KiB in one layer (default: 16 64)"
    )
    parser.add_argument(
        "--num-blocks", type=int, nargs="+", default=[1, 16, 128, 512], help="blocks of a put (default: 1 16 128 512)"
    )
    parser.add_argument("--num-layers", type=int, default=8, help="layers of a put (default: 8)")
    parser.add_argument(
        "--ranks",
        type=int,
        nargs=2,
        default=[1, 1],
        metavar=("SENDER", "RECEIVER"),
        help="ranks of either end, on GPUs; over nccl each on a GPU of its own (default: 1 1)",
    )
    parser.add_argument("--window", type=int, default=8, help="puts at once, for the rate (default: 8)")
    parser.add_argument("--seconds", type=float, default=1.0, help="of each measurement (default: 1)")
    parser.add_argument("--staging-mib", type=int, help="transfer_staging_bytes in MiB (default: as for a worker)")
    parser.add_argument(
        "--kill-sender", action="store_true", help="also measure what one sender's death costs another (GPUs)"
    )
    parser.add_argument("--save-result", type=Path, metavar="FILE", help="write the rows as JSON")


def main(args: argparse.Namespace) -> int:
    """Measure, print a table, save it; 1 if something arrived wrong."""
    staging_mib = 1 if args.staging_mib is None else args.staging_mib
    if min(*args.block_kib, *args.num_blocks, *args.ranks, args.num_layers, args.window, staging_mib) < 1:
        names = "--block-kib, --num-blocks, --ranks, --num-layers, --window and --staging-mib"
        raise ConfigError(f"{names} must be at least 1")
    check_ranks(args)
    results: list[dict[str, Any]] = []
    for channel in args.channel:
        rows: list[TransferRow] = []
        for block_kib in args.block_kib:
            with _way(args, channel, block_kib) as way:
                if not rows:
                    print(way.name)
                    print(format_row(TITLES))
                for num_blocks in args.num_blocks:
                    rows.append(measure(way, block_kib, num_blocks, args))
                    print(format_row(cells(rows[-1])), flush=True)
        result: dict[str, Any] = {"way": way.name, "rows": [row._asdict() for row in rows]}
        if args.kill_sender:
            result["death"] = _kill_sender(args, channel)._asdict()
        results.append(result)
    if args.save_result:
        args.save_result.write_text(json.dumps(results, indent=1) + "\n")
    return 0 if all(row["is_right"] for result in results for row in result["rows"]) else 1


def check_ranks(args: argparse.Namespace) -> None:
    """Raises:
    ConfigError: something else is asked for that peers of several ranks do not do.
    """
    sizes = f"--ranks is {' '.join(map(str, args.ranks))}"
    if max(args.ranks) == 1:
        return
    if any(RANK_HEADS % number for number in args.ranks):
        raise ConfigError(f"{sizes}, but a block has {RANK_HEADS} heads, which both must divide")
    if args.kill_sender:
        raise ConfigError(f"{sizes}, which goes without --kill-sender")


def _kill_sender(args: argparse.Namespace, channel: str) -> Death:
    from pdray.bench.sender_death import VICTIM_BLOCKS, format_death, measure_death

    spec = _spec(args, channel, args.block_kib[-1], VICTIM_BLOCKS)
    if spec.device != "cuda":
        raise ConfigError("--kill-sender needs a GPU: the object store has no sender that could hold up others")
    death = measure_death(spec, three_environments())
    print(format_death(death), flush=True)
    return death


def measure(way: Way, block_kib: int, num_blocks: int, args: argparse.Namespace) -> TransferRow:
    """Warm up, then latency, then rate, then see what has arrived."""
    rng = random.Random(num_blocks)
    total = pool_blocks(max(args.num_blocks))
    source, destination = (rng.sample(range(1, total), num_blocks) for _ in range(2))
    way.send(source, destination, 0.0, 1)
    latency = way.send(source, destination, args.seconds / 2, 1).latency_s
    rate = way.send(source, destination, args.seconds, args.window)
    is_right = way.holds(SEED, source, destination)
    bytes_per_s = rate.num_bytes / rate.seconds
    put_mib = rate.num_bytes / rate.num_puts / MIB
    share = None if way.peer_copy is None else bytes_per_s / way.peer_copy
    return TransferRow(block_kib, num_blocks, put_mib, 1e3 * latency, bytes_per_s / 1e9, share, is_right)


SEED = 5
TITLES = ["block KiB", "blocks", "put MiB", "latency ms", "GB/s", "of peer copy", "right"]


def cells(row: TransferRow) -> list[str]:
    share = "-" if row.share is None else f"{100 * row.share:.0f} %"
    figures = [f"{row.put_mib:.2f}", f"{row.latency_ms:.2f}", f"{row.gb_per_s:.2f}", share]
    return [str(row.block_kib), str(row.num_blocks), *figures, "yes" if row.is_right else "NO"]


def format_row(texts: list[str]) -> str:
    return "".join(f"{text:>{max(9, len(title) + 2)}}" for text, title in zip(texts, TITLES, strict=True))


def pool_blocks(num_blocks: int) -> int:
    """Blocks of each pool: twice the largest put, so that its blocks lie scattered, and the dummy block."""
    return 2 * num_blocks + 1


def _way(args: argparse.Namespace, channel: str, block_kib: int) -> contextlib.AbstractContextManager[Way]:
    spec = _spec(args, channel, block_kib, max(args.num_blocks))
    if spec.device == "cuda":
        return gpu_way(spec, tuple(args.ranks))
    if max(args.ranks) > 1:
        raise ConfigError("--ranks needs GPUs")
    return object_store_way(spec)


def _spec(args: argparse.Namespace, channel: str, block_kib: int, num_blocks: int) -> PoolSpec:
    """Of a pool for puts of so many blocks."""
    import torch

    from pdray.bench.pool_spec import PoolSpec

    use_cuda = args.device == "cuda" or (args.device == "auto" and torch.cuda.is_available())
    if use_cuda and not torch.cuda.is_available():
        raise ConfigError("--device is cuda, but torch sees no GPU")
    return PoolSpec(
        "receiver",
        args.num_layers,
        pool_blocks(num_blocks),
        1024 * block_kib,
        secrets.token_bytes(32),
        staging_bytes=None if args.staging_mib is None else args.staging_mib * MIB,
        timeout_s=10.0,
        device="cuda" if use_cuda else "cpu",
        num_heads=RANK_HEADS if max(args.ranks) > 1 else 1,
        kind=channel if use_cuda else "object_store",
    )


def visible_gpus() -> list[str]:
    """Names of the visible GPUs, as in CUDA_VISIBLE_DEVICES."""
    import torch

    everything = ",".join(str(index) for index in range(torch.cuda.device_count()))
    return [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", everything).split(",") if gpu]


def peer_environments(gpus: list[str], ranks: tuple[int, int] = (1, 1), kind: str = "") -> list[dict[str, str]]:
    """Environments of a sender and a receiver, each of which sees a GPU for each of its ranks; they have no GPU in
    common if there are enough.

    Args:
        kind: of channel; nccl takes each GPU once.

    Raises:
        ConfigError: there are fewer GPUs than ranks of one of them, or over nccl of both.
    """
    from pdray.testing.one_gpu import one_gpu_environment

    if max(ranks) > 1:
        if len(gpus) < (needed := sum(ranks) if kind == "nccl" else max(ranks)):
            text = f"--ranks is {ranks[0]} {ranks[1]}, but there are {len(gpus)} GPUs"
            raise ConfigError(f"{text}; {kind or 'every kind of channel'} needs {needed}")
        theirs = gpus[ranks[0] :] if len(gpus) >= sum(ranks) else gpus
        return [{"CUDA_VISIBLE_DEVICES": ",".join(seen)} for seen in (gpus[: ranks[0]], theirs[: ranks[1]])]
    if len(gpus) >= 2:
        return [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in gpus[:2]]
    return [{"CUDA_VISIBLE_DEVICES": gpus[0]} | one_gpu_environment(name) for name in ("sender", "receiver")]


def three_environments() -> list[dict[str, str]]:
    """Environments of two senders and a receiver, which has a GPU of its own if there are two."""
    sender, receiver = peer_environments(visible_gpus())
    names = [environment.get("NCCL_HOSTID") for environment in (sender, receiver)]
    other = sender if None in names else sender | {"NCCL_HOSTID": f"{names[0]}-too"}
    return [sender, other, receiver]


@contextlib.contextmanager
def gpu_way(spec: PoolSpec, ranks: tuple[int, int] = (1, 1)) -> Iterator[Way]:
    """Two workers, each on GPUs of its own where there are enough.

    Args:
        ranks: of the sender and of the receiver.
    """
    from pdray.bench.transfer_ranks import receiving_peer, sending_peer

    environments = peer_environments(visible_gpus(), ranks, spec.kind)
    with contextlib.ExitStack() as stack:
        ours = spec._replace(name="sender", num_ranks=ranks[0], num_peer_ranks=ranks[1])
        their_spec = spec._replace(num_ranks=ranks[1], num_peer_ranks=ranks[0])
        sender = PeerProcess(sending_peer, ours, environment=environments[0])
        stack.callback(sender.stop)
        receiver = PeerProcess(receiving_peer, their_spec, environment=environments[1])
        stack.callback(receiver.stop)
        facts, theirs = (peer.call("describe", timeout_s=START_TIMEOUT_S) for peer in (sender, receiver))
        if not facts.get("version", facts.get("gpu")):
            raise PdrayError("cupy is not there: install pdray[cuda12] or pdray[cuda13]")
        port = receiver.call("start")
        offer = receiver.call("accept", "sender", 1)
        sender.call("connect", "receiver", port, 1, offer)
        sender.call("fill", SEED)
        peer_copy, two_gpus = None, facts["gpu"] != theirs["gpu"]
        if two_gpus:
            copier = PeerProcess(PeerCopy)
            peer_copy = copier.call("measure", timeout_s=START_TIMEOUT_S)
            copier.stop()
        shared = "one GPU, through the loopback device" if spec.kind == "nccl" else "one GPU"
        where = "two GPUs" if two_gpus else shared
        if max(ranks) > 1:
            num_gpus = len({*facts["gpu"].split(","), *theirs["gpu"].split(",")})
            where = f"{ranks[0]} to {ranks[1]} ranks on {num_gpus} GPUs"
        name = f"{spec.kind} {facts.get('version', '')}".rstrip() + ", " + where
        if peer_copy is not None:
            name += f", cudaMemcpyPeer {peer_copy / 1e9:.0f} GB/s"

        def send(source: list[int], destination: list[int], seconds: float, window: int) -> Rate:
            receiver.call("aim", destination)
            rate: Rate = sender.call("send", source, seconds, window, timeout_s=START_TIMEOUT_S)
            return rate

        yield Way(name, send, lambda *blocks: receiver.call("holds", *blocks, timeout_s=START_TIMEOUT_S), peer_copy)


class PeerCopy:
    """One process that sees two GPUs."""

    def measure(self) -> float:
        """Bytes per second of the fastest of a few copies of 1 GiB from the first GPU to the second."""
        import torch

        source, target = (torch.empty(2**30, dtype=torch.uint8, device=f"cuda:{i}") for i in range(2))
        seconds = []
        for _ in range(6):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            target.copy_(source, non_blocking=True)
            end.record()
            end.synchronize()
            seconds.append(begin.elapsed_time(end) / 1e3)
        return float(len(source) / min(seconds))

    def close(self) -> None: ...


@contextlib.contextmanager
def object_store_way(spec: PoolSpec) -> Iterator[Way]:
    """The object store channel from this process to a Ray actor."""
    import ray

    from pdray.bench.transfer_peers import ReceivingPeer, SendingPeer
    from pdray.ray_cluster import start_local
    from pdray.transfer.channel import Link

    if not ray.is_initialized():
        start_local(include_dashboard=False)
    actor: Any = ray.remote(ReceivingPeer).options(num_cpus=0).remote(spec)
    offer = ray.get(actor.accept.remote("sender", 1))
    sender = SendingPeer(spec._replace(name="sender"))
    sender.fill(SEED)
    call = partial(actor.receive_array.remote, spec.kind, "sender", 1)
    asyncio.run(sender.open(Link("receiver", 1, lambda payload: None, call, sender.failures.append), offer))

    def send(source: list[int], destination: list[int], seconds: float, window: int) -> Rate:
        ray.get(actor.aim.remote(destination))
        return asyncio.run(sender.send(source, seconds, window))

    try:
        yield Way("object store, CPU", send, lambda *blocks: bool(ray.get(actor.holds.remote(*blocks))))
    finally:
        asyncio.run(sender.close())
        ray.kill(actor)
