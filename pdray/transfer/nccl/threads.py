"""The two kinds of thread of a channel: one that does its work, and one that ends what hangs."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from pdray.background import start_thread

logger = logging.getLogger(__name__)

MIN_POLL_S = 50e-6
MAX_POLL_S = 100e-6  # each poll takes Python's lock from the engine's thread


class PollingThread:
    """Runs posted calls in order, and poll() after them and again while that says that something is under way.

    Args:
        poll: returns False once only another call can change something.
        on_error: called on this thread with what a call or poll() raised; the thread has ended then.
    """

    def __init__(self, name: str, poll: Callable[[], bool], on_error: Callable[[BaseException], None]) -> None:
        self._poll = poll
        self._condition = threading.Condition()
        self._calls: list[Callable[[], None]] = []
        self._stopping = False
        self._thread = start_thread(name, self._run, on_error)

    def post(self, call: Callable[[], None]) -> None:
        """Run a call on this thread. From any thread; does nothing after the thread's end."""
        with self._condition:
            self._calls.append(call)
            self._condition.notify()

    def stop(self) -> None:
        """End after the call or poll that runs, and wait for that unless called from the thread itself. Idempotent."""
        with self._condition:
            self._stopping = True
            self._condition.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        wait_s: float | None = None
        while (calls := self._take(wait_s)) is not None:
            for call in calls:
                call()
            if not self._poll():
                wait_s = None
            elif calls or wait_s is None:
                wait_s = MIN_POLL_S
            else:
                wait_s = min(2 * wait_s, MAX_POLL_S)

    def _take(self, wait_s: float | None) -> list[Callable[[], None]] | None:
        """Posted calls, after waiting so long for one (None: forever); None once the thread is to stop."""
        with self._condition:
            if not self._calls and not self._stopping:
                self._condition.wait(wait_s)
            if self._stopping:
                return None
            calls, self._calls = self._calls, []
            return calls


class Watchdog:
    """Calls on_expire, on a thread of its own, when a deadline that was set has passed without being set anew.

    What on_expire raises is logged; the thread watches on.
    """

    def __init__(self, name: str, on_expire: Callable[[], None]) -> None:
        self._name = name
        self._on_expire = on_expire
        self._condition = threading.Condition()
        self._deadline: float | None = None
        self._wakes_at: float | None = None
        self._stopped = False
        self._thread = start_thread(name, self._run, self._failed)

    def set(self, deadline: float | None) -> None:
        """Deadline by time.monotonic(); None: there is none. Cheap, from any thread."""
        with self._condition:
            self._deadline = deadline
            if deadline is not None and (self._wakes_at is None or deadline < self._wakes_at):
                self._condition.notify()

    def stop(self) -> None:
        """Waits for on_expire, if it runs on another thread. Idempotent."""
        with self._condition:
            self._stopped = True
            self._condition.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        while self._wait():
            try:
                self._on_expire()
            except Exception as error:
                self._failed(error)

    def _failed(self, error: BaseException) -> None:
        logger.error("%s failed", self._name, exc_info=error)

    def _wait(self) -> bool:
        """True when the deadline has passed, False once stopped."""
        with self._condition:
            while not self._stopped:
                self._wakes_at = self._deadline
                left = None if self._deadline is None else self._deadline - time.monotonic()
                if left is not None and left <= 0:
                    self._deadline = None
                    return True
                self._condition.wait(left)
            return False
