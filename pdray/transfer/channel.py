"""The interface of every channel.

A channel joins one prefill worker to one decode worker for one epoch. Its sending half lives at the
prefill worker (`SendChannel`); what arrives at the decode worker goes through a `BlockSink`, which
asks the lease table before a byte is written. Sources stay pinned and destinations stay leased by
the caller until the put's future is done; a channel owns only its own staging.
"""

from __future__ import annotations

from collections.abc import Hashable
from concurrent.futures import Future
from typing import NamedTuple, Protocol

import torch


class Put(NamedTuple):
    """Some blocks of some layers of one leg.

    Attributes:
        key: the leg that the blocks belong to.
        layers: half-open range of layers.
        source_blocks, destination_blocks: block ids, same length, pairwise.
    """

    key: Hashable
    layers: range
    source_blocks: list[int]
    destination_blocks: list[int]


class PutResult(NamedTuple):
    """Attributes:
    accepted: False if the receiver no longer held the lease and wrote nothing.
    num_bytes: payload moved. seconds: from put() until the receiver had it.
    """

    accepted: bool
    num_bytes: int
    seconds: float


class SendChannel(Protocol):
    """The prefill worker's half.

    put() may be called from the event loop's thread only and never blocks. Its future completes,
    from any thread, once the source may be overwritten and nothing of this put can reach the
    destination any more; it fails with TransferError when the channel is closed or the put failed.
    """

    epoch: int

    def put(self, put: Put) -> Future[PutResult]: ...

    def close(self) -> None:
        """Fail what is in flight and refuse what follows. Idempotent; returns when nothing of this
        channel can write to the destination any more. May block up to the channel's deadline."""


class BlockSink(Protocol):
    """The decode worker's half, called by the channel's transport for every put that arrives."""

    def receive(self, worker_id: str, epoch: int, put: Put, blocks: torch.Tensor) -> bool:
        """Write ``blocks`` [len(layers), n, 2, block_size, num_kv_heads, head_dim] into the pool.

        Returns False, and writes nothing, if the leg's lease does not let that worker write in that
        epoch (closed, quarantined, replaced). Event loop's thread only."""
        ...
