"""The places of test writes, behind the blocks of a rank's pool."""

from __future__ import annotations

from typing import NamedTuple

import torch

from pdray.engine.kv.pool import KVPool
from pdray.transfer.cuda_ipc.messages import NUM_PROBES, PROBE_BYTES
from pdray.transfer.cuda_ipc.transport import Transport
from pdray.transfer.streams import Event


class ProbeRead(NamedTuple):
    """What lies at a place, [PROBE_BYTES] uint8 on the host, once ``done`` has passed."""

    found: torch.Tensor
    done: Event


class Probes:
    """Reads them on a stream of its own, so that no step is waited for.

    Args:
        pool: with spare memory; see KVPool.

    Attributes:
        offset: of the first place, in bytes from the pool's beginning; the same in each rank's pool.
    """

    def __init__(self, pool: KVPool, transport: Transport) -> None:
        assert pool.spare is not None
        self._places = pool.spare.view(NUM_PROBES, PROBE_BYTES)
        self._stream = transport.new_stream()
        self.offset = pool.spare.data_ptr() - pool.tensor.data_ptr()

    def read(self, number: int, *, clear: bool = False) -> ProbeRead:
        """Enqueue reading one place, which is zeros afterwards if it is cleared."""
        place = self._places[number]
        host = torch.zeros(PROBE_BYTES, dtype=torch.uint8, pin_memory=place.is_cuda)

        def copy() -> None:
            host.copy_(place, non_blocking=True)
            if clear:
                place.zero_()

        self._stream.run(copy)
        return ProbeRead(host, self._stream.record())
