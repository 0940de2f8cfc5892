"""Channel orders: what rank 0's channel kinds ask of the same kinds in another rank. One at a time for each rank."""

from __future__ import annotations

import os
import queue
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from pdray.background import start_thread
from pdray.errors import RankDiedError, TransferError, describe_error

if TYPE_CHECKING:
    from pdray.transfer.channel import Kind


class ChannelOrder(msgspec.Struct, frozen=True, array_like=True):
    """See OtherRank.ask()."""

    kind: str
    payload: bytes


class ChannelAnswer(msgspec.Struct, frozen=True, array_like=True):
    """Attributes:
    error: why the order could not be carried out; "": it was.
    """

    payload: bytes
    error: str = ""


encode = msgspec.msgpack.Encoder().encode
decode_order = msgspec.msgpack.Decoder(ChannelOrder).decode
decode_answer = msgspec.msgpack.Decoder(ChannelAnswer).decode


class _Asked(NamedTuple):
    order: ChannelOrder
    answer: Future[bytes]


class AskedRank:
    """An OtherRank at the end of a pipe.

    Args:
        connection: orders go by it, and answers come; this object's, which closes it.
        wait_until_dead: returns once the process was seen dead, of which the connection has shown that it ends.
    """

    def __init__(self, rank: int, connection: Connection, wait_until_dead: Callable[[], object]) -> None:
        self._rank = rank
        self._connection = connection
        self._wait_until_dead = wait_until_dead
        self._asked: queue.SimpleQueue[_Asked | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._is_closed = False
        self._thread = start_thread(f"rank-{rank}-channels", self._work_off, self._failed)

    def ask(self, kind: str, payload: bytes) -> Future[bytes]:
        """See OtherRank."""
        answer: Future[bytes] = Future()
        with self._lock:
            if self._is_closed:
                answer.set_exception(self._death())
            else:
                self._asked.put(_Asked(ChannelOrder(kind, payload), answer))
        return answer

    def close(self) -> None:
        """The process was seen dead. What is asked from now on fails at once. Idempotent."""
        with self._lock:
            if not self._is_closed:
                self._is_closed = True
                self._asked.put(None)

    def _work_off(self) -> None:
        lives = True
        while asked := self._asked.get():
            if asked.answer.set_running_or_notify_cancel():
                lives = lives and self._carry_out(asked)
                if not lives:
                    asked.answer.set_exception(self._death())
        self._connection.close()

    def _death(self) -> RankDiedError:
        return RankDiedError(f"rank {self._rank} has ended")

    def _carry_out(self, asked: _Asked) -> bool:
        """Settle the answer; False if the process has ended before it came."""
        try:
            self._connection.send_bytes(encode(asked.order))
            answer = decode_answer(self._connection.recv_bytes())
        except (EOFError, OSError):
            self._wait_until_dead()
            return False
        if answer.error:
            asked.answer.set_exception(TransferError(f"rank {self._rank}: {answer.error}"))
        else:
            asked.answer.set_result(answer.payload)
        return True

    def _failed(self, error: BaseException) -> None:
        """Without this thread no question would be answered."""
        print(f"error: rank {self._rank} cannot be asked any more: {error!r}", file=sys.stderr, flush=True)
        os._exit(1)


class ChannelFollower:
    """Carries out channel orders on a thread of its own, beside the steps of this rank.

    Args:
        kinds: by name. connection: orders come by it, and are answered.
    """

    def __init__(self, kinds: Mapping[str, Kind], connection: Connection) -> None:
        self._kinds = kinds
        self._connection = connection
        self._thread = start_thread("channel-orders", self._follow, self._failed)

    def _follow(self) -> None:
        try:
            while True:
                order = decode_order(self._connection.recv_bytes())
                self._connection.send_bytes(encode(self._carry_out(order)))
        except (EOFError, OSError):
            pass  # rank 0 is gone, or takes its leave

    def _carry_out(self, order: ChannelOrder) -> ChannelAnswer:
        try:
            return ChannelAnswer(self._kinds[order.kind].answer(order.payload))
        except Exception as error:
            traceback.print_exc()
            return ChannelAnswer(b"", describe_error(error))

    @staticmethod
    def _failed(error: BaseException) -> None:
        """A rank without this thread is none: rank 0 would wait for its answers."""
        print(f"error: channel orders are not followed any more: {error!r}", file=sys.stderr, flush=True)
        os._exit(1)
