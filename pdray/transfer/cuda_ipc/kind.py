"""The cuda_ipc channel kind: what it can join, and how its two ends are made."""

from __future__ import annotations

import asyncio

import torch

from pdray.engine.kv.pool import KVPool
from pdray.errors import describe_error
from pdray.kernels.kv.peer_write import PeerBlocks, write_peer_blocks
from pdray.transfer.channel import Kind, Link, Sink, Site
from pdray.transfer.cuda_ipc.block_ids import BlockIds
from pdray.transfer.cuda_ipc.messages import PROBE_BYTES, SPARE_BYTES, Offer
from pdray.transfer.cuda_ipc.receiver import CudaIpcReceiver
from pdray.transfer.cuda_ipc.sender import CudaIpcSender, write_probe
from pdray.transfer.cuda_ipc.transport import CudaTransport, Transport, has_cupy
from pdray.transfer.cuda_ipc.unmapped import UnmappedSender
from pdray.transfer.pending_writes import PendingWrites
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

    @property
    def spare_bytes(self) -> int:
        """See Kind. Test writes go there."""
        return 0 if self._transport is None else SPARE_BYTES

    @property
    def facts(self) -> dict[str, str]:
        """See Kind. gpu names the physical GPU; peers are those that it can write to, "?" where nobody knows."""
        transport = self._transport
        if transport is None:
            return {} if self._site.device.type != "cuda" else {"cupy": ""}
        peers = "?" if transport.peers is None else ",".join(transport.peers)
        return {"gpu": transport.gpu, "host": transport.host, "peers": peers}

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
        reachable = ours["peers"].split(",")
        if theirs["gpu"] not in (ours["gpu"], *reachable) and reachable != ["?"]:
            return f"{prefill.worker_id}'s GPU {ours['gpu']} cannot write to {decode.worker_id}'s {theirs['gpu']}"
        return None

    def attach(self, pool: KVPool) -> None:
        """See Kind. Compiles and loads the kernels; the pool stays as it was."""
        self._pool = pool
        if not pool.tensor.is_cuda:
            return
        ids = torch.zeros(2, 1, dtype=torch.int32, device=pool.device)
        own = PeerBlocks(pool.tensor.data_ptr(), pool.num_blocks)
        write_peer_blocks(pool.tensor, range(pool.layout.num_layers), ids, own)
        place = torch.zeros(PROBE_BYTES, dtype=torch.uint8, device=pool.device)
        write_probe(0, pool.device, PeerBlocks(place.data_ptr(), 1))
        torch.cuda.synchronize(pool.device)

    def make_receiver(self, sink: Sink, writes: PendingWrites) -> CudaIpcReceiver:
        """See Kind. This end writes nothing that ``writes`` could be told of."""
        assert self._transport is not None
        return CudaIpcReceiver(self._pool, self._transport, sink, self._site.on_fatal)

    async def open(self, link: Link, offer: Offer) -> CudaIpcSender | UnmappedSender:
        """See Kind. Maps the decode worker's pool."""
        transport = self._transport
        assert transport is not None
        try:
            mapping = await asyncio.to_thread(transport.borrow, offer.handle)
        except Exception as error:  # whatever the driver says
            return UnmappedSender(link, describe_error(error), self._site.config.worker_timeout_s)
        if link.peer not in self._block_ids_of:
            self._block_ids_of[link.peer] = self._block_ids.pop()
        return CudaIpcSender(
            self._pool,
            offer,
            mapping,
            transport.new_stream(),
            self._block_ids_of[link.peer],
            link,
            self._site.config.worker_timeout_s,
        )
