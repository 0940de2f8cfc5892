"""The two ends that `pdray bench transfer` and the GPU checks put into processes, here in one, over a fake device."""

from __future__ import annotations

import argparse
import asyncio
import io
import os
import sys
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import NamedTuple

import pytest
import torch

from pdray.bench import transfer
from pdray.bench.peer_process import PeerProcess
from pdray.bench.pool_spec import PoolSpec
from pdray.bench.transfer import peer_environments
from pdray.bench.transfer_peers import ReceivingPeer, SendingPeer
from pdray.errors import ConfigError, PdrayError, TransferError
from pdray.transfer.channel import Kind, Site
from pdray.transfer.cuda_ipc.kind import CudaIpcKind
from pdray.transfer.nccl.kind import NcclKind

fake_device = sys.modules["fake_device"]  # see conftest.py
SPEC = PoolSpec("receiver", 4, 40, 1024, b"secret", staging_bytes=300_000, timeout_s=1.0, device="cpu")


class Ends(NamedTuple):
    sender: SendingPeer
    receiver: ReceivingPeer
    port: int


def make_kind(name: str, gpu: str) -> Callable[[Site], Kind]:
    if name == "nccl":
        return partial(NcclKind, transport=fake_device.HostTransport(gpu))
    return partial(CudaIpcKind, transport=fake_device.HostMemory(gpu))


@pytest.fixture(params=["nccl", "cuda_ipc"])
async def ends(request: pytest.FixtureRequest) -> AsyncIterator[Ends]:
    receiver = ReceivingPeer(SPEC._replace(kind=request.param), make_kind(request.param, "one"))
    sender = SendingPeer(SPEC._replace(name="sender", kind=request.param), make_kind(request.param, "two"))
    ends = Ends(sender, receiver, await receiver.start())
    yield ends
    await sender.close()
    await receiver.close()


async def test_what_was_sent_is_held(ends: Ends) -> None:
    sender, receiver, port = ends
    assert await sender.connect("receiver", port, 1, await receiver.accept("sender", 1)) > 0
    sender.fill(3)
    source, destination = list(range(1, 20)), list(range(30, 11, -1))
    receiver.aim(destination)
    rate = await sender.send(source, 0.05, 3)
    assert rate.num_puts > 1 and rate.num_bytes == rate.num_puts * 4 * 19 * 1024
    assert receiver.status() == (rate.num_puts, ["sender"], [])
    assert receiver.holds(3, source, destination) and not receiver.pool.any()
    await sender.send(source, 0.0, 1)
    assert not receiver.holds(3, [*source[1:], 39], destination), "another block"
    await sender.send(source, 0.0, 1)
    assert not receiver.holds(3, source[1:], destination[1:]), "one block too many"
    assert sender.works()


@pytest.mark.parametrize("ends", ["nccl"], indirect=True)
async def test_a_failure_is_timed_and_the_next_epoch_works(ends: Ends) -> None:
    sender, receiver, port = ends
    await sender.connect("receiver", port, 1, await receiver.accept("sender", 1))
    receiver.aim([1])
    wire = sender.kind._transport.communicators[0].wire  # type: ignore[attr-defined]
    asyncio.get_running_loop().call_later(0.1, lambda: setattr(wire, "faults", lambda number: False))
    text, seconds = await sender.send_until_it_fails([1], 20.0)
    assert "did not get on" in text and seconds < 10
    with pytest.raises(TransferError):
        await sender.send([1], 0.0, 1)
    await sender.connect("receiver", port, 2, await receiver.accept("sender", 2))
    sender.fill(1)
    await sender.send([1], 0.0, 1)
    assert torch.equal(receiver.pool[:, 1].view(torch.int16), sender.pool[:, 1].view(torch.int16))


def test_a_peer_in_a_process_of_its_own() -> None:
    peer = PeerProcess(io.StringIO, "hello")
    assert peer.call("getvalue") == "hello"
    with pytest.raises(PdrayError, match="seek: ValueError"):
        peer.call("seek", -1)
    peer.post("read", 2)
    assert peer.result("read") == "he"
    peer.kill()
    with pytest.raises(PdrayError, match=r"ended in read \(-9\)"):
        peer.call("read")
    peer.stop()


def test_ranks_have_gpus_of_their_own_where_there_are_enough() -> None:
    seen = [[each["CUDA_VISIBLE_DEVICES"] for each in peer_environments(list("abcd"[:n]), (2, 2))] for n in (2, 4)]
    assert seen == [["a,b", "a,b"], ["a,b", "c,d"]]
    with pytest.raises(ConfigError, match="--ranks is 1 4, but there are 2 GPUs"):
        peer_environments(["a", "b"], (1, 4))
    assert [each["CUDA_VISIBLE_DEVICES"] for each in peer_environments(list("abc"), (1, 2), "nccl")] == ["a", "b,c"]
    with pytest.raises(ConfigError, match="--ranks is 2 2, but there are 3 GPUs; nccl needs 4"):
        peer_environments(list("abc"), (2, 2), "nccl")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--ranks 3 1", "--ranks is 3 1, but a block has 8 heads"),
        ("--ranks 2 1 --channel nccl --device cpu", "--ranks needs GPUs"),
        ("--ranks 2 1 --kill-sender", "without --kill-sender"),
        ("--ranks 2 1 --device cpu", "--ranks needs GPUs"),
        ("--ranks 0 1", "--ranks, .* must be at least 1"),
    ],
)
def test_what_does_not_go_with_ranks_is_refused(options: str, message: str) -> None:
    parser = argparse.ArgumentParser()
    transfer.add_arguments(parser)
    with pytest.raises(ConfigError, match=message):
        transfer.main(parser.parse_args(options.split()))


def test_a_peer_has_an_environment_of_its_own() -> None:
    peer = PeerProcess(os.popen, "echo $PEER_TEST", environment={"PEER_TEST": "here"})
    assert peer.call("read") == "here\n" and "PEER_TEST" not in os.environ
    peer.stop()
