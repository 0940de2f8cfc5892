"""Messages that any worker sends its routers unasked: what its prefix cache holds, and that its engine failed."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from pdray.wire.message import LegKey, Message


class PrefixUpdate(Message, frozen=True):
    """Contents of a worker's prefix cache, for routing; sent to every router when it connects, then at intervals.

    Attributes:
        added, removed: 8 bytes for each block: its short hash, little-endian. is_all: added is everything.
    """

    added: bytes
    removed: bytes = b""
    is_all: bool = False


def pack_hashes(hashes: Iterable[int]) -> bytes:
    return np.fromiter(hashes, dtype="<u8").tobytes()


def unpack_hashes(packed: bytes) -> list[int]:
    hashes: list[int] = np.frombuffer(packed, dtype="<u8").tolist()
    return hashes


class StepFailed(Message, frozen=True):
    """The worker's engine has failed, or hangs, and its process ends: everything that it held is lost.

    Attributes:
        suspects: the legs, of all routers, that the steps in flight computed; empty if that is not known.
    """

    reason: str
    suspects: list[LegKey]
