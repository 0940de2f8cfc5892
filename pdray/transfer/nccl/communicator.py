"""The two ends of a nccl channel's pipe: what a communicator can do, how one is made, and how one is given up.

NCCL's calls can hang forever when the peer is gone, and only an abort from another thread ends them. An init cannot
be aborted at all.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Protocol

from pdray.background import start_thread
from pdray.errors import TransferError

if TYPE_CHECKING:
    from pdray.transfer.streams import Stream

logger = logging.getLogger(__name__)

INIT_TIMEOUT_S = 30.0
CALL_GRACE_S = 0.2  # calls take microseconds, unless they hang
SENDER_RANK, RECEIVER_RANK = 0, 1


class Communicator(Protocol):
    """One rank of two. Whatever one sends, the other must receive, in the same order and sizes."""

    def send(self, pointer: int, num_bytes: int, stream: Stream) -> None:
        """Enqueue a send of device memory, which is in use until the stream has passed it."""

    def recv(self, pointer: int, num_bytes: int, stream: Stream) -> None:
        """Enqueue a receive into device memory."""

    def abort(self) -> None:
        """End everything that was enqueued, and the communicator with it. From any thread, also during a call."""


class Transport(Protocol):
    """The machine's side of the nccl channel; tests replace it by a fake.

    Attributes:
        gpu: names the physical GPU. version: both ends must have the same.
    """

    gpu: str
    version: str

    def make_unique_id(self) -> Any:
        """Names a new pair of ranks: opaque, to be handed to the peer."""
        ...

    def connect(self, unique_id: Any, rank: int) -> Communicator:
        """Blocks until the other rank has come too."""
        ...

    def new_stream(self) -> Stream: ...


class GuardedCommunicator:
    """A communicator that no call reaches any more once close() has begun."""

    def __init__(self, inner: Communicator) -> None:
        self._inner = inner
        self._condition = threading.Condition()
        self._num_calls = 0
        self._closed = False
        self._aborted = threading.Event()

    @property
    def closed(self) -> bool:
        return self._closed

    def send(self, pointer: int, num_bytes: int, stream: Stream) -> None:
        """See Communicator.

        Raises:
            TransferError: it is closed, or was while this call ran.
        """
        with self._call():
            self._inner.send(pointer, num_bytes, stream)

    def recv(self, pointer: int, num_bytes: int, stream: Stream) -> None:
        """See send()."""
        with self._call():
            self._inner.recv(pointer, num_bytes, stream)

    @contextlib.contextmanager
    def _call(self) -> Iterator[None]:
        with self._condition:
            self._check()
            self._num_calls += 1
        try:
            yield
        finally:
            with self._condition:
                self._num_calls -= 1
                self._condition.notify_all()
        self._check()

    def _check(self) -> None:
        if self._closed:
            raise TransferError("the communicator is closed")

    def close(self) -> None:
        """Refuse what follows, abort what runs. Idempotent; returns when it is done. Takes about half a second."""
        with self._condition:
            first, self._closed = not self._closed, True
            if first:
                self._condition.wait_for(lambda: not self._num_calls, CALL_GRACE_S)
        if first:
            try:
                self._inner.abort()
            finally:
                self._aborted.set()
        self._aborted.wait()


def run_all(calls: Sequence[Callable[[], object]]) -> None:
    """Call all of these at once, each of which may take half a second. Returns when they have returned.

    Raises:
        Exception: what the first of them has raised.
    """
    if len(calls) == 1:
        calls[0]()
    elif calls:
        with ThreadPoolExecutor(len(calls), thread_name_prefix="nccl-all") as pool:
            running = [pool.submit(call) for call in calls]
        for each in running:
            each.result()


async def open_communicators(
    connects: Sequence[Callable[[], Communicator]], *, on_stuck: Callable[[str], None] | None = None
) -> list[GuardedCommunicator]:
    """All of them, or none; see open_communicator().

    Raises:
        TransferError: one of them failed. Returns only when none is still being opened, unless it is cancelled.
    """
    opening = [asyncio.ensure_future(open_communicator(connect, on_stuck=on_stuck)) for connect in connects]
    try:
        opened = await asyncio.gather(*opening, return_exceptions=True)
    except BaseException:  # cancelled, and so is what is being opened
        close_soon([each.result() for each in opening if has_opened(each)])
        raise
    communicators = [each for each in opened if isinstance(each, GuardedCommunicator)]
    for each in opened:
        if isinstance(each, BaseException):
            close_soon(communicators)
            raise each
    return communicators


def has_opened(opening: asyncio.Future[Any]) -> bool:
    """Whether there is something that is to be closed."""
    return opening.done() and not opening.cancelled() and opening.exception() is None


def close_soon(communicators: list[GuardedCommunicator]) -> None:
    """On threads of their own; from any thread."""
    for each in communicators:
        start_thread("nccl-late", each.close, _late_close_failed)


async def open_communicator(
    connect: Callable[[], Communicator],
    *,
    timeout_s: float = INIT_TIMEOUT_S,
    on_stuck: Callable[[str], None] | None = None,
) -> GuardedCommunicator:
    """Call ``connect`` on a thread of its own.

    Args:
        on_stuck: called if it has not returned after timeout_s; default: this process ends, because the thread would
            hold the device, and there is no way to end it.

    Raises:
        TransferError: it failed, or is stuck and on_stuck has returned.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[GuardedCommunicator] = loop.create_future()

    def settle(communicator: GuardedCommunicator | None, error: BaseException | None) -> None:
        if done.done():  # nobody waits any more
            if communicator is not None:
                close_soon([communicator])
        elif communicator is not None:
            done.set_result(communicator)
        else:
            done.set_exception(TransferError(f"no communicator: {error!r}"))

    def run() -> None:
        loop.call_soon_threadsafe(settle, GuardedCommunicator(connect()), None)

    def fail(error: BaseException) -> None:
        loop.call_soon_threadsafe(settle, None, error)

    start_thread("nccl-init", run, fail)
    try:
        async with asyncio.timeout(timeout_s):
            return await done
    except asyncio.CancelledError:
        if has_opened(done):  # in this very moment
            close_soon([done.result()])
        raise
    except TimeoutError:
        text = f"NCCL's init has not returned after {timeout_s:g} s"
        (on_stuck or end_process)(text)
        raise TransferError(text) from None


def _late_close_failed(error: BaseException) -> None:
    logger.error("a communicator that came too late could not be closed", exc_info=error)


def end_process(reason: str) -> None:
    """What becomes of a process that NCCL does not let go of."""
    logger.critical("%s: this process ends, and the Coordinator starts another", reason)
    os._exit(1)
