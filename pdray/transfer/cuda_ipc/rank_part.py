"""What a rank other than 0 does of its worker's cuda_ipc channels: it lends its pool, and writes its heads."""

from __future__ import annotations

from collections.abc import Callable

from pdray.engine.kv.pool import KVPool
from pdray.transfer.channel import FinishAnswer
from pdray.transfer.cuda_ipc.block_ids import BlockIds
from pdray.transfer.cuda_ipc.probes import Probes
from pdray.transfer.cuda_ipc.rank_orders import (
    CloseLink,
    DescribeGpu,
    GpuFacts,
    LendPool,
    OpenLink,
    ReadProbe,
    WriteBlocks,
    WriteProbe,
    decode_order,
    encode,
)
from pdray.transfer.cuda_ipc.transport import Transport
from pdray.transfer.cuda_ipc.writer import Enqueued, PoolWriter, unpack_ids


class RankPart:
    """Carries out rank 0's orders on a thread of their own, beside the steps; writes are enqueued one behind the other.

    Args:
        ids_of: gives the room for block ids that a peer's channels have, of every epoch.
    """

    def __init__(self, pool: KVPool, transport: Transport, ids_of: Callable[[str], BlockIds]) -> None:
        self._pool = pool
        self._transport = transport
        self._ids_of = ids_of
        self._writers: dict[int, PoolWriter] = {}  # by link
        self._probes: Probes | None = None

    def begin(self, payload: bytes) -> FinishAnswer:
        """See Kind.begin_answer(). Raises whatever the driver says."""
        answer = b""
        match decode_order(payload):
            case DescribeGpu():
                answer = encode(GpuFacts(self._transport.gpu, self._transport.host, self._transport.peers))
            case LendPool():
                self._probes = self._probes or Probes(self._pool, self._transport)
                answer = self._transport.lend(self._pool.tensor)
            case ReadProbe(number, clear):
                assert self._probes is not None, "the pool is not lent"
                read = self._probes.read(number, clear=clear)
                return lambda: read.found.numpy().tobytes() if read.done.query() else None
            case OpenLink(link, peer, targets):
                self._writers[link] = PoolWriter(self._pool, self._transport, self._ids_of(peer), targets)
            case WriteProbe(link, epoch):
                done = self._writers[link].write_probe(epoch)
                return lambda: b"" if done.query() else None
            case WriteBlocks() as order:
                return self._write(order)
            case CloseLink(link):
                if link in self._writers:
                    self._writers[link].close(f"{link}")
                    del self._writers[link]
        return lambda: answer

    def _write(self, order: WriteBlocks) -> FinishAnswer:
        writer, layers = self._writers[order.link], range(order.first_layer, order.last_layer)
        source, target = unpack_ids(order.ids)

        def enqueue() -> Enqueued | None:
            return writer.write(layers, source, target, None, order.num_programs)

        enqueued = enqueue()

        def finish() -> bytes | None:
            nonlocal enqueued
            enqueued = enqueued or enqueue()  # there is room for its ids when those before it are done
            if enqueued is None or not enqueued.done.query():
                return None
            writer.ids.free(enqueued.region)
            return b""

        return finish
