"""Channel orders: what rank 0's channel kinds ask of the same kinds in another rank.

They are begun in the order in which they were asked, and each is answered when it is done: what waits for one peer does
not hold up what is for another.
"""

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
    from pdray.transfer.channel import FinishAnswer, Kind

POLL_S = 50e-6  # while the device is at it, and rank 0 waits


class ChannelOrder(msgspec.Struct, frozen=True, array_like=True):
    """See OtherRank.ask(). number: counts the orders of one rank."""

    number: int
    kind: str
    payload: bytes


class ChannelAnswer(msgspec.Struct, frozen=True, array_like=True):
    """Attributes:
    number: of the order. error: why it could not be carried out; "": it was.
    """

    number: int
    payload: bytes
    error: str = ""


encode = msgspec.msgpack.Encoder().encode
decode_order = msgspec.msgpack.Decoder(ChannelOrder).decode
decode_answer = msgspec.msgpack.Decoder(ChannelAnswer).decode


class _Begun(NamedTuple):
    number: int
    finish: FinishAnswer


class AskedRank:
    """An OtherRank at the end of a pipe. One thread sends, another takes the answers.

    Args:
        connection: orders go by it, and answers come; this object's, which closes it.
        wait_until_dead: returns once the process was seen dead, of which the connection has shown that it ends.
    """

    def __init__(self, rank: int, connection: Connection, wait_until_dead: Callable[[], object]) -> None:
        self._rank = rank
        self._connection = connection
        self._wait_until_dead = wait_until_dead
        self._to_send: queue.SimpleQueue[ChannelOrder | None] = queue.SimpleQueue()
        self._lock = threading.Lock()  # guards the rest
        self._is_dead = False
        self._num_asked = 0
        self._asked: dict[int, Future[bytes]] = {}  # not answered yet
        for name, work in (("orders", self._send), ("answers", self._receive)):
            start_thread(f"rank-{rank}-channel-{name}", work, self._failed)

    def ask(self, kind: str, payload: bytes) -> Future[bytes]:
        """See OtherRank."""
        answer: Future[bytes] = Future()
        answer.set_running_or_notify_cancel()  # it cannot be taken back
        with self._lock:
            is_dead = self._is_dead
            if not is_dead:
                self._num_asked += 1
                self._asked[self._num_asked] = answer
                self._to_send.put(ChannelOrder(self._num_asked, kind, payload))
        if is_dead:
            answer.set_exception(self._death())
        return answer

    def _send(self) -> None:
        while order := self._to_send.get():
            try:
                self._connection.send_bytes(encode(order))
            except OSError:
                return  # the process has ended, as the other thread sees

    def _receive(self) -> None:
        try:
            while True:
                answer = decode_answer(self._connection.recv_bytes())
                with self._lock:
                    future = self._asked.pop(answer.number)
                if answer.error:
                    future.set_exception(TransferError(f"rank {self._rank}: {answer.error}"))
                else:
                    future.set_result(answer.payload)
        except (EOFError, OSError):
            self._wait_until_dead()
        with self._lock:
            self._is_dead = True
            unanswered, self._asked = self._asked, {}
        self._to_send.put(None)
        for future in unanswered.values():
            future.set_exception(self._death())
        self._connection.close()

    def _death(self) -> RankDiedError:
        return RankDiedError(f"rank {self._rank} has ended")

    def _failed(self, error: BaseException) -> None:
        """Without these threads no question would be answered."""
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
        self._begun: list[_Begun] = []
        start_thread("channel-orders", self._follow, self._failed)

    def _follow(self) -> None:
        try:
            while True:
                if self._connection.poll(POLL_S if self._begun else None):
                    order = decode_order(self._connection.recv_bytes())
                    self._begun.append(_Begun(order.number, self._begin(order)))
                begun, self._begun = self._begun, []
                for each in begun:
                    answer = self._finish(each)
                    if answer is None:
                        self._begun.append(each)
                    else:
                        self._connection.send_bytes(encode(answer))
        except (EOFError, OSError):
            pass  # rank 0 is gone, or takes its leave

    def _begin(self, order: ChannelOrder) -> FinishAnswer:
        try:
            return self._kinds[order.kind].begin_answer(order.payload)
        except Exception as error:
            failure = error

        def fail() -> bytes:
            raise failure

        return fail

    @staticmethod
    def _finish(begun: _Begun) -> ChannelAnswer | None:
        try:
            answer = begun.finish()
        except Exception as error:
            if not isinstance(error, TransferError):  # of a peer's; rank 0 says what becomes of the channel
                traceback.print_exc()
            return ChannelAnswer(begun.number, b"", describe_error(error))
        return None if answer is None else ChannelAnswer(begun.number, answer)

    @staticmethod
    def _failed(error: BaseException) -> None:
        """A rank without this thread is none: rank 0 would wait for its answers."""
        print(f"error: channel orders are not followed any more: {error!r}", file=sys.stderr, flush=True)
        os._exit(1)
