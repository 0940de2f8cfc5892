"""A channel that misbehaves on purpose: a wrapper for tests of everything that must survive it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Literal

from pdray.errors import TransferError
from pdray.transfer.channel import Put, PutResult, Sender


@dataclass(frozen=True, slots=True)
class Fault:
    """The fault that befalls a put.

    Attributes:
        kind: "delay" sends it delay_s late; "fail" never sends it and fails its future; "fail_after"
            sends it, then fails its future; "lose" never sends it and its future hangs until close().
    """

    kind: Literal["delay", "fail", "fail_after", "lose"]
    delay_s: float = 0.0


class FaultInjectingSender(Sender):
    """A Sender around another one; ``plan(n, put)`` says what befalls the n-th put (from 0)."""

    kind = "fault_injecting"

    def __init__(self, inner: Sender, plan: Callable[[int, Put], Fault | None]) -> None:
        self.epoch = inner.epoch
        self._inner = inner
        self._plan = plan
        self._num_puts = 0
        self._timers: list[asyncio.TimerHandle] = []
        self._pending: list[Future[PutResult]] = []

    def put(self, put: Put) -> Future[PutResult]:
        fault = self._plan(self._num_puts, put)
        self._num_puts += 1
        if fault is None:
            return self._inner.put(put)
        future: Future[PutResult] = Future()
        if fault.kind == "fail":
            future.set_exception(TransferError("injected failure before the put"))
        elif fault.kind == "lose":
            self._pending.append(future)
        elif fault.kind == "fail_after":
            self._inner.put(put).add_done_callback(
                lambda _: future.set_exception(TransferError("injected failure after the put"))
            )
        else:
            self._pending.append(future)
            loop = asyncio.get_running_loop()  # where the inner one is to be called
            self._timers.append(loop.call_later(fault.delay_s, self._forward, put, future))
        return future

    def on_message(self, epoch: int, payload: bytes) -> None:
        self._inner.on_message(epoch, payload)

    def step_ended(self) -> None:
        self._inner.step_ended()

    def end_leg(self, key: Hashable) -> None:
        self._inner.end_leg(key)

    def _forward(self, put: Put, future: Future[PutResult]) -> None:
        def settle(inner: Future[PutResult]) -> None:
            if future.done():
                return
            error = inner.exception()
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(inner.result())

        self._inner.put(put).add_done_callback(settle)

    def close(self) -> None:
        for timer in self._timers:
            timer.cancel()
        self._inner.close()
        for future in self._pending:
            if not future.done():
                future.set_exception(TransferError("channel was closed"))
