"""What a cuda_ipc sender knows of its puts: which belong in one write, and what is on its way."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pdray.transfer.channel import Put, PutResult
from pdray.transfer.cuda_ipc.block_ids import MAX_BLOCKS
from pdray.transfer.cuda_ipc.messages import Places
from pdray.transfer.ring import Region
from pdray.transfer.streams import Event
from pdray.wire.message import LegKey


@dataclass(eq=False, slots=True)
class Outgoing:
    """A put from put() until its future is done.

    Attributes:
        targets: blocks of the receiver's pool; empty until they are known.
        num_left: its parts that are not written yet.
    """

    put: Put
    future: Future[PutResult]
    started: float
    targets: list[int] = field(default_factory=list)
    num_left: int = 0

    @property
    def places(self) -> Places:
        """As the put names them."""
        put = self.put
        key = LegKey(*put.key)  # type: ignore[misc]
        where = put.layers.start, put.layers.stop, put.first_position, len(put.source_blocks)
        return Places(*key, *where)


class Part(NamedTuple):
    """Blocks [start, stop) of a put's lists."""

    outgoing: Outgoing
    start: int
    stop: int

    @property
    def layers(self) -> range:
        return self.outgoing.put.layers

    @property
    def ready(self) -> Any:
        return self.outgoing.put.ready


class Write(NamedTuple):
    """Parts that one kernel writes: of the same layers, final after the same event.

    Attributes:
        region: of their block ids. done: after the kernel.
    """

    parts: list[Part]
    region: Region
    done: Event


def cut(outgoing: Outgoing) -> list[Part]:
    """Its parts, each small enough for one write."""
    count = len(outgoing.put.source_blocks)
    parts = [Part(outgoing, start, min(start + MAX_BLOCKS, count)) for start in range(0, count, MAX_BLOCKS)]
    outgoing.num_left = len(parts)
    return parts


def take_alike(parts: deque[Part]) -> list[Part]:
    """The first part, and those behind it that can be written with it; they stay in the queue."""
    first, taken, num_blocks = parts[0], [], 0
    for part in parts:
        num_blocks += part.stop - part.start
        if (part.layers, part.ready) != (first.layers, first.ready) or num_blocks > MAX_BLOCKS:
            break
        taken.append(part)
    return taken
