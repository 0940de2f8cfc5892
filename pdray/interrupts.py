"""Ctrl-C and SIGTERM at a moment that would leave processes behind, or when there is nothing to clean up yet."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

INTERRUPTED = 130  # exit status of a command that Ctrl-C has ended
SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM wait until the block has ended, and deliver them then.

    ray.init() interrupted halfway forgets the processes that it has started already. A handler that the block sets
    where there was none is in force after it. Off the main thread, where no signal is handled, this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []

    def hold(number: int, _frame: FrameType | None) -> None:
        held.append(number)

    before = {number: signal.signal(number, hold) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not signal.SIG_DFL or signal.getsignal(number) is hold:
                signal.signal(number, handler)
    if held:
        signal.raise_signal(held[0])


@contextmanager
def interrupts_ignored() -> Iterator[None]:
    """Ignore Ctrl-C and SIGTERM in the block: a second one, during the clean-up after the first, would leave workers
    behind.
    """
    before = {number: signal.signal(number, signal.SIG_IGN) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def interrupts_end_the_process() -> Iterator[None]:
    """Let Ctrl-C end the process at once and silently: for imports, during which there is nothing to clean up.

    A KeyboardInterrupt would come out of the middle of a library's import, where some print it and some swallow it.
    Where Ctrl-C is ignored, or has another handler, it stays so.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    before = signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
