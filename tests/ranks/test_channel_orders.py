"""What rank 0's channels ask of another rank: begun in order, answered as it is done."""

from __future__ import annotations

import multiprocessing
import threading
from typing import Any

import pytest

from pdray.errors import RankDiedError, TransferError
from pdray.ranks.channel_orders import AskedRank, ChannelFollower
from pdray.testing.patience import PATIENCE_S
from pdray.transfer.channel import FinishAnswer


class Kind:
    """Answers to what it is asked, once that is set."""

    def __init__(self) -> None:
        self.begun: list[bytes] = []
        self.done: dict[bytes, threading.Event] = {name: threading.Event() for name in (b"one", b"two", b"three")}

    def begin_answer(self, payload: bytes) -> FinishAnswer:
        self.begun.append(payload)
        if payload == b"wrong":
            raise ValueError("no such order")
        return lambda: payload.upper() if self.done[payload].is_set() else None


def test_an_order_that_waits_holds_up_no_other() -> None:
    """One peer may hang, and what is for another goes on; what is raised fails one alone."""
    kind, dead = Kind(), threading.Event()
    ours, theirs = multiprocessing.Pipe()
    kinds: Any = {"kind": kind}
    rank = AskedRank(1, ours, dead.wait)
    ChannelFollower(kinds, theirs)
    one, two, wrong, three = (rank.ask("kind", name) for name in (b"one", b"two", b"wrong", b"three"))
    kind.done[b"three"].set()
    assert three.result(PATIENCE_S) == b"THREE"
    with pytest.raises(TransferError, match="rank 1: ValueError: no such order"):
        wrong.result(PATIENCE_S)
    assert kind.begun == [b"one", b"two", b"wrong", b"three"] and not one.done() and not two.done()
    kind.done[b"two"].set()
    assert two.result(PATIENCE_S) == b"TWO" and not one.done()
    theirs.close()
    dead.set()
    for future in (one, rank.ask("kind", b"one")):
        with pytest.raises(RankDiedError):
            future.result(PATIENCE_S)
