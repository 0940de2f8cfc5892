"""Communicators that a rank other than 0 enters: begun when it is asked to, and looked at again and again."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from pdray.background import start_thread
from pdray.errors import TransferError
from pdray.transfer.nccl.communicator import (
    INIT_TIMEOUT_S,
    Communicator,
    GuardedCommunicator,
    close_soon,
    end_process,
    run_all,
)


class Opening:
    """Calls each of ``connects`` on a thread of its own. Any thread, but for what says otherwise.

    Args:
        on_stuck: called if one has not returned after timeout_s; see open_communicator().
    """

    def __init__(
        self,
        connects: Sequence[Callable[[], Communicator]],
        *,
        timeout_s: float = INIT_TIMEOUT_S,
        on_stuck: Callable[[str], None] = end_process,
    ) -> None:
        self._timeout_s = timeout_s
        self._on_stuck = on_stuck
        self._deadline = time.monotonic() + timeout_s
        self._lock = threading.Lock()  # guards the rest
        self._opened: list[GuardedCommunicator | None] = [None] * len(connects)
        self._errors: list[BaseException] = []
        self._num_left = len(connects)
        self._given_up = False
        for number, connect in enumerate(connects):
            self._start(number, connect)

    def finish(self) -> list[GuardedCommunicator] | None:
        """All of them, in order; None while one is being opened.

        Raises:
            TransferError: one of them could not be; or they were given up.
        """
        with self._lock:
            if self._given_up:
                raise TransferError("given up before its communicators were there")
            if self._num_left and time.monotonic() < self._deadline:
                return None
            is_stuck, errors = self._num_left > 0, list(self._errors)
            opened = [each for each in self._opened if each is not None]
        if is_stuck:
            text = f"NCCL's init has not returned after {self._timeout_s:g} s"
            self._on_stuck(text)
            raise TransferError(text)
        if errors:
            raise TransferError(f"no communicator: {errors[0]!r}")
        return opened

    def give_up(self) -> None:
        """Close what has opened, and what will. Returns when the former is done; about half a second."""
        with self._lock:
            self._given_up = True
            opened = [each for each in self._opened if each is not None]
        run_all([each.close for each in opened])

    def _start(self, number: int, connect: Callable[[], Communicator]) -> None:
        start_thread("nccl-init", lambda: self._add(number, GuardedCommunicator(connect())), self._failed)

    def _add(self, number: int, communicator: GuardedCommunicator) -> None:
        with self._lock:
            self._num_left -= 1
            self._opened[number] = communicator
            is_late = self._given_up
        if is_late:
            close_soon([communicator])

    def _failed(self, error: BaseException) -> None:
        with self._lock:
            self._num_left -= 1
            self._errors.append(error)
