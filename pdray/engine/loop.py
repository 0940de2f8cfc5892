"""A thread that steps an engine while there is work, and sleeps while there is none."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from pdray.engine.request import RequestUpdate

if TYPE_CHECKING:
    from pdray.engine.engine import Engine


NEAR_POLL_S = 2e-4  # while a step is near that nothing runs before: short enough for a CPU to stay awake


class EngineLoop:
    """Runs engine.step() on its own thread.

    Args:
        on_updates: called on that thread with every booked step's updates, in order, also when there are none; must not
            block.
        on_error: called on that thread, once, with what made a step (or on_updates) fail; the loop has ended then.
            Without it the error goes to threading.excepthook.
    """

    def __init__(
        self,
        engine: Engine,
        on_updates: Callable[[list[RequestUpdate]], None],
        on_error: Callable[[BaseException], None] | None = None,
    ) -> None:
        self.engine = engine
        self.on_updates = on_updates
        self.on_error = on_error
        self._condition = threading.Condition()
        self._stopping = False
        self._may_prepare = True
        self._has_deferred = False  # something to prepare, until no first step is near
        self._progress_at: float | None = None  # None while it sleeps
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        engine.on_work = self.wake

    def start(self) -> None:
        """Start the thread. Once only."""
        self._progress_at = time.monotonic()
        self._thread.start()

    def stop(self) -> None:
        """End after the step in flight, and wait for that. Idempotent; not from the loop's own thread."""
        with self._condition:
            self._stopping = True
            self._condition.notify()
        if self._thread.ident is not None:
            self._thread.join()

    def wake(self) -> None:
        """There may be work, or something to prepare. The engine calls it by itself; from any thread."""
        with self._condition:
            self._may_prepare = True
            self._condition.notify()

    def seconds_since_progress(self) -> float:
        """Age of the step in flight, or of the failure that ended the loop; 0 while there is nothing to do."""
        progress_at = self._progress_at
        return 0.0 if progress_at is None else time.monotonic() - progress_at

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                updates = self.engine.step()
                if updates or self.engine.has_booked:  # else a first step was launched, and there is nothing to tell
                    self.on_updates(updates)
        except BaseException as error:
            if self.on_error is None:
                raise
            self.on_error(error)

    def _wait_for_work(self) -> bool:
        """Sleep until there is work, once nothing is left to prepare; False once the loop is to stop."""
        is_near, near_s = False, 0.0
        while True:
            with self._condition:
                # While a first step is near, only wake() ends the wait: what comes together is to start together.
                while not (self._stopping or self._may_prepare or (not is_near and self.engine.has_work())):
                    self._progress_at = None
                    if not self._condition.wait(NEAR_POLL_S if is_near else near_s or None):
                        break
                may_look = self._may_prepare or not is_near
                is_idle = not (self._stopping or (may_look and self.engine.has_work()))
                self._progress_at = None if self._stopping or is_idle else time.monotonic()
                if not is_idle:
                    return not self._stopping
                may_prepare, self._may_prepare = self._may_prepare or self._has_deferred, False
            near_s = self._prepare() if may_prepare else 0.0
            is_near = self.engine.first_steps.keep_warm()

    def _prepare(self) -> float:
        """Prepare something; what takes longer than a first step may wait for is put off until none is near.

        Returns:
            After how many seconds to call this again; 0: when something has happened.
        """
        first_steps = self.engine.first_steps
        near_s = first_steps.near_s()
        self._has_deferred = near_s > 0
        if near_s > 0:
            first_steps.prepare()
        elif self.engine.prepare_more():
            self._may_prepare = True
        return near_s
