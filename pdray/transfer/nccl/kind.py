"""The nccl channel kind: what it can join, and how its two ends are made."""

from __future__ import annotations

import asyncio
import dataclasses
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from pdray.background import BackgroundTasks
from pdray.engine.kv.pool import KVPool
from pdray.errors import HandshakeError
from pdray.transfer.asking import answers_of, wait_until_ended
from pdray.transfer.channel import FinishAnswer, Kind, Link, OtherRank, Sink, Site, WorkerRanks
from pdray.transfer.nccl.communicator import (
    SENDER_RANK,
    GuardedCommunicator,
    Transport,
    close_soon,
    has_opened,
    open_communicators,
)
from pdray.transfer.nccl.head_split import HeadSplit, lanes_of
from pdray.transfer.nccl.interface import use_interface_of
from pdray.transfer.nccl.messages import OpenCommunicators, UniqueId, encode
from pdray.transfer.nccl.other_sends import OtherSends, ask_all
from pdray.transfer.nccl.rank_orders import SetUp, decode_facts
from pdray.transfer.nccl.rank_part import RankPart
from pdray.transfer.nccl.receiver import NcclReceiver, Offer
from pdray.transfer.nccl.send_lane import SendLane
from pdray.transfer.nccl.sender import NcclSender
from pdray.transfer.nccl.staging import ID_AREA_BYTES, Staging, default_staging_bytes, share_buffer
from pdray.transfer.nccl.transport import CudaTransport
from pdray.transfer.pending_writes import PendingWrites
from pdray.transfer.routes import head_routes
from pdray.wire.cluster_view import WorkerInfo

HOST_VARIABLE = "NCCL_HOSTID"  # by which NCCL tells hosts apart, where it is set


class NcclKind(Kind):
    """NCCL between GPUs: a communicator for every rank of one worker and every rank of the other that it has heads for.

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
        self._gpus = [] if transport is None else [transport.gpu]  # by rank
        self._split = HeadSplit(site.sends, 1, site.num_peer_ranks, 0, 0, [])
        number = site.num_peers if transport is not None and transport.version else 0
        self._staging_bytes = site.config.transfer_staging_bytes or _default_bytes(site)
        size = site.num_peer_ranks * ID_AREA_BYTES + self._staging_bytes  # a rank has a lane for each of them at most
        self._buffers = [torch.zeros(size, dtype=torch.uint8, device=site.device) for _ in range(number)]
        self._stagings: list[list[Staging]] = []  # that no peer has: one for each lane
        self._stagings_of: dict[str, list[Staging]] = {}  # by peer, for every epoch
        self._next_link = 0
        self._tasks = BackgroundTasks(site.on_fatal)
        self._part: RankPart | None = None

    @property
    def facts(self) -> dict[str, str]:
        """See Kind. gpu names the physical GPU of each rank; version is NCCL's, "" if this process cannot use it;
        interface is the one that NCCL was told to use; kv_heads are the model's; peer_ranks are those of each peer, for
        which there is staging."""
        if self._transport is None:
            return {}
        return {
            "gpu": ",".join(self._gpus),
            "version": self._transport.version,
            "host": os.environ.get(HOST_VARIABLE, ""),
            "interface": self._interface,
            "kv_heads": str(self._split.num_kv_heads),
            "peer_ranks": str(self._split.num_peer_ranks),
        }

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
        sources, targets = ours["gpu"].split(","), theirs["gpu"].split(",")
        for info, facts, peer, gpus in ((prefill, ours, decode, targets), (decode, theirs, prefill, sources)):
            if facts["peer_ranks"] != str(len(gpus)):
                expected = f"{info.worker_id} has staging for peers of {facts['peer_ranks']} ranks"
                return f"{expected}, and {peer.worker_id} has {len(gpus)}"
        if ours.get("host") != theirs.get("host"):
            return None
        for route in head_routes(int(ours["kv_heads"]), len(sources), len(targets)):
            if (gpu := sources[route.source]) == targets[route.target]:
                return f"{prefill.worker_id} and {decode.worker_id} share {gpu}, and NCCL takes a GPU only once"
        return None

    def attach(self, pool: KVPool) -> None:
        """See Kind."""
        self._pool = pool
        if self._site.config.tensor_parallel_size == 1:  # else rank 0 knows the rest
            self._set_up(SetUp(0, 1, pool.layout.num_kv_heads))

    def attach_ranks(self, pool: KVPool, ranks: WorkerRanks) -> None:
        """See Kind."""
        self._pool = pool
        number = len(ranks.others) + 1
        self._split = self._split._replace(others=ranks.others)
        self._set_up(SetUp(0, number, ranks.num_kv_heads))
        if not self._buffers:
            return
        orders = [SetUp(rank, number, ranks.num_kv_heads) for rank in range(1, number)]
        asked = [ask_all([other], order)[0] for other, order in zip(ranks.others, orders, strict=True)]
        facts = [decode_facts(future.result()) for future in asked]
        self._gpus += [each.gpu for each in facts]
        sizes = [self._split.piece_bytes, *(each.piece_bytes for each in facts if each.piece_bytes is not None)]
        self._split = self._split._replace(piece_bytes=min(sizes))

    def _set_up(self, order: SetUp) -> int | None:
        """Make this rank's stagings. Returns the largest piece that fits all of them; None: there are none."""
        sends, num_peer_ranks = self._site.sends, self._site.num_peer_ranks
        lanes = lanes_of(order.rank, order.num_kv_heads, order.num_ranks, num_peer_ranks, sends=sends)
        self._stagings = [share_buffer(self._pool, buffer, self._staging_bytes, lanes) for buffer in self._buffers]
        stagings = [staging for each in self._stagings for staging in each]
        for staging in stagings:
            staging.warm_up()
        piece_bytes = min((staging.piece_bytes for staging in stagings), default=None)
        self._split = self._split._replace(
            num_ranks=order.num_ranks, num_kv_heads=order.num_kv_heads, piece_bytes=piece_bytes or 0
        )
        return piece_bytes

    def begin_answer(self, payload: bytes) -> FinishAnswer:
        """See Kind."""
        if self._part is None:
            assert self._transport is not None
            self._part = RankPart(self._site, self._transport, self._set_up, self._take_stagings)
        return self._part.begin(payload)

    def _take_stagings(self, peer: str) -> list[Staging]:
        """Of every epoch of that peer."""
        if peer not in self._stagings_of:
            self._stagings_of[peer] = self._stagings.pop()
        return self._stagings_of[peer]

    def make_receiver(self, sink: Sink, writes: PendingWrites) -> NcclReceiver:
        """See Kind."""
        assert self._transport is not None
        return NcclReceiver(
            self._take_stagings(""),
            self._split,
            self._transport,
            sink,
            writes,
            name=self._site.worker_id,
            timeout_s=self._site.config.worker_timeout_s,
            on_fatal=self._site.on_fatal,
        )

    async def open(self, link: Link, offer: Offer) -> NcclSender:
        """See Kind. Enters the communicators together with the decode worker, in each rank that sends to it."""
        transport, loop, split = self._transport, asyncio.get_running_loop(), self._split
        assert transport is not None
        if offer.num_ranks != split.num_peer_ranks:
            raise HandshakeError(
                f"{link.peer} has {offer.num_ranks} ranks, where {split.num_peer_ranks} are configured; start both "
                "from one configuration"
            )

        def soon(call: Callable[[Any], None], argument: Any) -> None:
            if not loop.is_closed():  # else it belonged to a worker that has ended
                loop.call_soon_threadsafe(call, argument)

        piece_bytes = min(split.piece_bytes, offer.piece_bytes)
        unique_ids = [await asyncio.to_thread(transport.make_unique_id) for _ in split.routes]
        link.send(encode(OpenCommunicators(piece_bytes, split.num_ranks, unique_ids)))
        own, *rest = split.by_rank(unique_ids)
        others, ids = self._other_sends(rest)
        stagings = self._take_stagings(link.peer)
        communicators = await self._connect(link, others, own, ids, piece_bytes)
        layout = dataclasses.replace(self._pool.layout, num_kv_heads=split.num_kv_heads)
        return NcclSender(
            layout,
            [
                SendLane(staging, each, transport.new_stream, epoch=link.epoch, piece_bytes=piece_bytes)
                for staging, each in zip(stagings, communicators, strict=True)
            ],
            others,
            name=link.peer,
            epoch=link.epoch,
            timeout_s=self._site.config.worker_timeout_s,
            send=partial(soon, link.send),
            on_failed=partial(soon, link.on_failed),
        )

    async def _connect(
        self, link: Link, others: OtherSends, own: list[UniqueId], ids: list[list[UniqueId]], piece_bytes: int
    ) -> list[GuardedCommunicator]:
        transport = self._transport
        assert transport is not None
        asked = others.open(link.peer, link.epoch, piece_bytes, ids)
        connects = [partial(transport.connect, each, SENDER_RANK) for each in own]
        opening = asyncio.ensure_future(open_communicators(connects))
        try:
            await asyncio.gather(opening, answers_of(asked), return_exceptions=True)
            communicators = await opening
            await answers_of(asked)
        except BaseException:
            if has_opened(opening):
                close_soon(opening.result())
            if others.ranks:
                await asyncio.shield(self._tasks.spawn(self._take_back(others)))
            raise
        return communicators

    @staticmethod
    async def _take_back(others: OtherSends) -> None:
        await asyncio.to_thread(wait_until_ended, others.close())

    def _other_sends(self, ids: list[list[UniqueId]]) -> tuple[OtherSends, list[list[UniqueId]]]:
        """Those of the other ranks that have anything to send, and by which communicators."""
        used = [(rank, part) for rank, part in zip(self._split.others, ids, strict=True) if part]
        ranks: list[OtherRank] = [rank for rank, _ in used]
        self._next_link += 1
        return OtherSends(ranks, self._next_link), [part for _, part in used]


def _default_bytes(site: Site) -> int:
    whole = torch.cuda.mem_get_info(site.device)[1] if site.device.type == "cuda" else 0
    return default_staging_bytes(whole, site.num_peers)
