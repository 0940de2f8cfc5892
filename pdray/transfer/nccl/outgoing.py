"""What a nccl sender knows of a put on its way."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field

from pdray.transfer.channel import Put, PutResult
from pdray.transfer.nccl.staging import Piece, Region
from pdray.transfer.streams import Event

NO_PUT = Put(("", 0), range(0), [], 0)  # what a probe says that it is


@dataclass(eq=False, slots=True)
class Packed:
    """A piece in staging. done: what was enqueued for it last."""

    region: Region
    num_bytes: int
    done: Event


@dataclass(eq=False, slots=True)
class Outgoing:
    """A put from put() until its future is done; put is None for a probe."""

    seq: int
    put: Put | None
    future: Future[PutResult]
    started: float
    pieces: list[Piece] = field(default_factory=list)
    num_packed: int = 0  # pieces whose packing was enqueued
    packed: deque[Packed] = field(default_factory=deque)  # and were not sent yet
    announced_at: float | None = None
    granted: bool = False
    refused: bool = False

    @property
    def num_pieces(self) -> int:
        return 1 if self.put is None else len(self.pieces)
