"""The nccl channel kind: what it can join, and how its two ends are made."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from pdray.engine.kv.pool import KVPool
from pdray.transfer.channel import Kind, Link, Sink, Site
from pdray.transfer.nccl.communicator import SENDER_RANK, Transport, open_communicator
from pdray.transfer.nccl.interface import use_interface_of
from pdray.transfer.nccl.messages import OpenCommunicator, encode
from pdray.transfer.nccl.receiver import NcclReceiver, Offer
from pdray.transfer.nccl.sender import NcclSender
from pdray.transfer.nccl.staging import ID_AREA_BYTES, Staging, default_staging_bytes
from pdray.transfer.nccl.transport import CudaTransport
from pdray.transfer.pending_writes import PendingWrites
from pdray.wire.cluster_view import WorkerInfo

HOST_VARIABLE = "NCCL_HOSTID"  # by which NCCL tells hosts apart, where it is set


class NcclKind(Kind):
    """NCCL between two GPUs.

    Args:
        transport: tests put their own in its place. Default: this process's GPU, if its device is one.
    """

    name = "nccl"

    def __init__(self, site: Site, transport: Transport | None = None) -> None:
        self._site = site
        self._interface = use_interface_of(site.address)
        if transport is None and site.device.type == "cuda":
            transport = CudaTransport(site.device)
        self._transport = transport
        number = site.num_peers if self.facts.get("version") else 0
        size = ID_AREA_BYTES + (site.config.transfer_staging_bytes or _default_bytes(site))
        self._buffers = [torch.zeros(size, dtype=torch.uint8, device=site.device) for _ in range(number)]
        self._stagings: list[Staging] = []  # that no peer has
        self._staging_of: dict[str, Staging] = {}  # by peer, for every epoch

    @property
    def facts(self) -> dict[str, str]:
        """See Kind. gpu names the physical GPU; version is NCCL's, "" if this process cannot use it; interface is the
        one that NCCL was told to use."""
        transport = self._transport
        if transport is None:
            return {}
        host = os.environ.get(HOST_VARIABLE, "")
        return {"gpu": transport.gpu, "version": transport.version, "host": host, "interface": self._interface}

    @classmethod
    def obstacle(cls, prefill: WorkerInfo, decode: WorkerInfo) -> str | None:
        """See Kind."""
        ours, theirs = (info.channels.get(cls.name, {}) for info in (prefill, decode))
        for info, facts in ((prefill, ours), (decode, theirs)):
            if not facts.get("gpu"):
                return f"{info.worker_id} runs on {info.device}"
            if not facts.get("version"):
                return f"{info.worker_id} has no NCCL: install pdray[cuda12] or pdray[cuda13]"
        if ours["version"] != theirs["version"]:
            return f"{prefill.worker_id} has NCCL {ours['version']} and {decode.worker_id} has {theirs['version']}"
        if ours["gpu"] == theirs["gpu"] and ours.get("host") == theirs.get("host"):
            return f"{prefill.worker_id} and {decode.worker_id} share {ours['gpu']}, and NCCL takes a GPU only once"
        return None

    def attach(self, pool: KVPool) -> None:
        """See Kind."""
        self._stagings = [Staging(pool, buffer) for buffer in self._buffers]
        for staging in self._stagings:
            staging.warm_up()

    def make_receiver(self, sink: Sink, writes: PendingWrites) -> NcclReceiver:
        """See Kind."""
        assert self._transport is not None
        return NcclReceiver(
            self._stagings[0],
            self._transport,
            sink,
            writes,
            name=self._site.worker_id,
            timeout_s=self._site.config.worker_timeout_s,
            on_fatal=self._site.on_fatal,
        )

    async def open(self, link: Link, offer: Offer) -> NcclSender:
        """See Kind. Enters the communicator together with the decode worker."""
        transport, loop = self._transport, asyncio.get_running_loop()
        assert transport is not None
        if link.peer not in self._staging_of:
            self._staging_of[link.peer] = self._stagings.pop()

        def soon(call: Callable[[Any], None], argument: Any) -> None:
            if not loop.is_closed():  # else it belonged to a worker that has ended
                loop.call_soon_threadsafe(call, argument)

        staging = self._staging_of[link.peer]
        piece_bytes = min(staging.piece_bytes, offer.piece_bytes)
        link.send(encode(OpenCommunicator(piece_bytes)))
        communicator = await open_communicator(partial(transport.connect, offer.unique_id, SENDER_RANK))
        return NcclSender(
            staging,
            communicator,
            transport.new_stream,
            name=link.peer,
            epoch=link.epoch,
            piece_bytes=piece_bytes,
            timeout_s=self._site.config.worker_timeout_s,
            send=partial(soon, link.send),
            on_failed=partial(soon, link.on_failed),
        )


def _default_bytes(site: Site) -> int:
    whole = torch.cuda.mem_get_info(site.device)[1] if site.device.type == "cuda" else 0
    return default_staging_bytes(whole, site.num_peers)
