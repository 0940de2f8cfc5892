"""What a rank other than 0 does of its worker's cuda_ipc channels: it lends its pool, and writes its heads."""

from __future__ import annotations

import time
from collections.abc import Callable

from pdray.engine.kv.pool import KVPool
from pdray.errors import TransferError
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
from pdray.transfer.cuda_ipc.writer import PoolWriter, unpack_ids
from pdray.transfer.streams import Event

POLL_S = 50e-6  # rank 0 waits for the answer


class RankPart:
    """Carries out rank 0's orders, one after the other, on a thread of their own beside the steps.

    Args:
        ids_of: gives the room for block ids that a peer's channels have, of every epoch.
    """

    def __init__(self, pool: KVPool, transport: Transport, ids_of: Callable[[str], BlockIds]) -> None:
        self._pool = pool
        self._transport = transport
        self._ids_of = ids_of
        self._writers: dict[int, PoolWriter] = {}  # by link
        self._probes: Probes | None = None

    def answer(self, payload: bytes) -> bytes:
        """Carry out an order; waits for the device.

        Raises:
            Exception: why it could not be; whatever the driver says.
        """
        match decode_order(payload):
            case DescribeGpu():
                return encode(GpuFacts(self._transport.gpu, self._transport.host, self._transport.peers))
            case LendPool():
                self._probes = self._probes or Probes(self._pool, self._transport)
                return self._transport.lend(self._pool.tensor)
            case ReadProbe(number, clear):
                assert self._probes is not None, "the pool is not lent"
                read = self._probes.read(number, clear=clear)
                _wait(read.done)
                return read.found.numpy().tobytes()
            case OpenLink(link, peer, targets):
                self._writers[link] = PoolWriter(self._pool, self._transport, self._ids_of(peer), targets)
            case WriteProbe(link, epoch):
                _wait(self._writers[link].write_probe(epoch))
            case WriteBlocks() as order:
                self._write(order)
            case CloseLink(link):
                if link in self._writers:
                    self._writers[link].close(f"{link}")
                    del self._writers[link]
        return b""

    def _write(self, order: WriteBlocks) -> None:
        writer, layers = self._writers[order.link], range(order.first_layer, order.last_layer)
        enqueued = writer.write(layers, *unpack_ids(order.ids), None, order.num_programs)
        if enqueued is None:
            raise TransferError("there is no room for the ids of one write, and no other is going on")
        try:
            _wait(enqueued.done)
        finally:
            writer.ids.free(enqueued.region)


def _wait(event: Event) -> None:
    while not event.query():
        time.sleep(POLL_S)
