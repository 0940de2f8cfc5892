"""The cuda_ipc channel kind: what it can join, and how its two ends are made."""

from __future__ import annotations

import asyncio
import dataclasses

import torch

from pdray.background import BackgroundTasks
from pdray.engine.kv.pool import KVPool
from pdray.errors import describe_error
from pdray.kernels.kv.peer_write import PeerBlocks, write_peer_blocks
from pdray.transfer.channel import FinishAnswer, Kind, Link, OtherRank, Sink, Site, WorkerRanks
from pdray.transfer.cuda_ipc.block_ids import BlockIds
from pdray.transfer.cuda_ipc.messages import SPARE_BYTES, Offer, probe_pattern
from pdray.transfer.cuda_ipc.other_ranks import OtherWriters, ask_all
from pdray.transfer.cuda_ipc.rank_orders import DescribeGpu, GpuFacts, decode_facts
from pdray.transfer.cuda_ipc.rank_part import RankPart
from pdray.transfer.cuda_ipc.receiver import CudaIpcReceiver
from pdray.transfer.cuda_ipc.sender import CudaIpcSender
from pdray.transfer.cuda_ipc.targets import Target, targets_of
from pdray.transfer.cuda_ipc.transport import CudaTransport, Transport, has_cupy
from pdray.transfer.cuda_ipc.unmapped import UnmappedSender
from pdray.transfer.cuda_ipc.writer import PoolWriter, write_probe
from pdray.transfer.pending_writes import PendingWrites
from pdray.transfer.routes import check_fit, head_routes
from pdray.wire.cluster_view import WorkerInfo


class CudaIpcKind(Kind):
    """CUDA IPC between two processes of one machine, on one GPU or on two that can write to each other.

    Args:
        transport: tests put their own in its place. Default: this process's GPU, if its device is one.
    """

    name = "cuda_ipc"

    def __init__(self, site: Site, transport: Transport | None = None) -> None:
        self._site = site
        if transport is None and site.device.type == "cuda" and has_cupy():
            transport = CudaTransport(site.device)
        self._transport = transport
        number = 0 if transport is None else site.num_peers
        self._block_ids = [BlockIds(site.device) for _ in range(number)]
        self._block_ids_of: dict[str, BlockIds] = {}  # by peer, for every epoch
        self._others: list[OtherRank] = []
        self._gpus = [] if transport is None else [GpuFacts(transport.gpu, transport.host, transport.peers)]  # by rank
        self._num_kv_heads = 0  # of the model; 0 before the pool is there
        self._next_link = 0
        self._tasks = BackgroundTasks(site.on_fatal)
        self._part: RankPart | None = None

    @property
    def spare_bytes(self) -> int:
        """See Kind. Test writes go there."""
        return 0 if self._transport is None else SPARE_BYTES

    @property
    def facts(self) -> dict[str, str]:
        """See Kind. gpu names the physical GPU of each rank; peers, of each, are those that it can write to, "?" where
        nobody knows; kv_heads are the model's."""
        if not self._gpus:
            return {} if self._site.device.type != "cuda" else {"cupy": ""}
        peers = ["?" if each.peers is None else ",".join(each.peers) for each in self._gpus]
        return {
            "gpu": ",".join(each.gpu for each in self._gpus),
            "host": self._gpus[0].host,
            "peers": ";".join(peers),
            "kv_heads": str(self._num_kv_heads),
        }

    @classmethod
    def obstacle(cls, prefill: WorkerInfo, decode: WorkerInfo) -> str | None:
        """See Kind."""
        ours, theirs = (info.channels.get(cls.name, {}) for info in (prefill, decode))
        for info, facts in ((prefill, ours), (decode, theirs)):
            if "cupy" in facts:
                return f"{info.worker_id} has no cupy: install pdray[cuda12] or pdray[cuda13]"
            if not facts.get("gpu"):
                return f"{info.worker_id} runs on {info.device}"
        if ours["host"] != theirs["host"]:
            return f"{prefill.worker_id} and {decode.worker_id} run on different machines"
        sources, targets = ours["gpu"].split(","), theirs["gpu"].split(",")
        reachable = [peers.split(",") for peers in ours["peers"].split(";")]
        for route in head_routes(int(ours["kv_heads"]), len(sources), len(targets)):
            source, target = sources[route.source], targets[route.target]
            if target not in (source, *reachable[route.source]) and reachable[route.source] != ["?"]:
                return f"{prefill.worker_id}'s GPU {source} cannot write to {decode.worker_id}'s {target}"
        return None

    def attach(self, pool: KVPool) -> None:
        """See Kind. Compiles and loads the kernels; the pool stays as it was."""
        self._pool = pool
        self._num_kv_heads = pool.layout.num_kv_heads
        if not pool.tensor.is_cuda:
            return
        ids = torch.zeros(2, 1, dtype=torch.int32, device=pool.device)
        own = PeerBlocks(pool.tensor.data_ptr(), pool.num_blocks)
        write_peer_blocks(pool.tensor, range(pool.layout.num_layers), ids, own)
        pattern = probe_pattern(0)
        place = torch.zeros(len(pattern), dtype=torch.uint8, device=pool.device)
        write_probe(pattern, pool.device, PeerBlocks(place.data_ptr(), 1))
        torch.cuda.synchronize(pool.device)

    def attach_ranks(self, pool: KVPool, ranks: WorkerRanks) -> None:
        """See Kind."""
        self.attach(pool)
        self._num_kv_heads = ranks.num_kv_heads
        if self._transport is not None:
            self._others = ranks.others
            self._gpus += [decode_facts(future.result()) for future in ask_all(ranks.others, DescribeGpu())]

    def begin_answer(self, payload: bytes) -> FinishAnswer:
        """See Kind."""
        if self._part is None:
            assert self._transport is not None
            self._part = RankPart(self._pool, self._transport, self._ids_of)
        return self._part.begin(payload)

    def make_receiver(self, sink: Sink, writes: PendingWrites) -> CudaIpcReceiver:
        """See Kind. This end writes nothing that ``writes`` could be told of."""
        assert self._transport is not None
        return CudaIpcReceiver(self._pool, self._transport, self._others, sink, self._site.on_fatal)

    async def open(self, link: Link, offer: Offer) -> CudaIpcSender | UnmappedSender:
        """See Kind. Maps the decode worker's pool, in each rank those of its ranks that it writes to."""
        timeout_s = self._site.config.worker_timeout_s
        check_fit(self._num_kv_heads, len(offer.handles), link.peer)
        own, *others_targets = targets_of(self._num_kv_heads, len(self._gpus), offer)
        others, used = self._other_writers(others_targets)
        try:
            writer = await self._map(link.peer, own, others, used)
        except Exception as error:  # whatever the driver says
            return UnmappedSender(link, describe_error(error), timeout_s)
        layout = dataclasses.replace(self._pool.layout, num_kv_heads=self._num_kv_heads)
        return CudaIpcSender(layout, writer, others, offer.num_blocks, link, timeout_s)

    async def _map(
        self, peer: str, own: list[Target], others: OtherWriters, others_targets: list[list[Target]]
    ) -> PoolWriter:
        transport = self._transport
        assert transport is not None
        mapping = asyncio.ensure_future(asyncio.to_thread(PoolWriter, self._pool, transport, self._ids_of(peer), own))
        try:
            writer = await asyncio.shield(mapping)
            await others.open(peer, others_targets)
        except BaseException:  # also cancelled: the thread maps on
            await asyncio.shield(self._tasks.spawn(self._take_back(mapping, others, peer)))
            raise
        return writer

    @staticmethod
    async def _take_back(mapping: asyncio.Future[PoolWriter], others: OtherWriters, peer: str) -> None:
        """Unmap what was mapped, and what is being mapped."""
        await asyncio.wait([mapping])
        await asyncio.to_thread(others.close)
        if mapping.exception() is None:
            await asyncio.to_thread(mapping.result().close, peer)

    def _other_writers(self, targets: list[list[Target]]) -> tuple[OtherWriters, list[list[Target]]]:
        """Those of the other ranks that have anything to write, and what."""
        used = [(rank, part) for rank, part in zip(self._others, targets, strict=True) if part]
        self._next_link += 1
        return OtherWriters([rank for rank, _ in used], self._next_link), [part for _, part in used]

    def _ids_of(self, peer: str) -> BlockIds:
        if peer not in self._block_ids_of:
            self._block_ids_of[peer] = self._block_ids.pop()
        return self._block_ids_of[peer]
