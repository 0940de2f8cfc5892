"""Ctrl-C is neither lost nor early."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from pdray.interrupts import interrupts_held, interrupts_ignored


@pytest.fixture(autouse=True)
def usual_handler() -> Iterator[None]:
    """Shells start background jobs with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_held_interrupt_comes_after_the_block() -> None:
    reached_end = False
    with pytest.raises(KeyboardInterrupt), interrupts_held():
        os.kill(os.getpid(), signal.SIGINT)
        reached_end = True
    assert reached_end
    with pytest.raises(KeyboardInterrupt):  # the usual handler is back
        signal.raise_signal(signal.SIGINT)


def test_an_error_in_the_block_is_not_replaced() -> None:
    with pytest.raises(ZeroDivisionError), interrupts_held():
        os.kill(os.getpid(), signal.SIGINT)
        raise ZeroDivisionError
    with interrupts_held():
        pass


def test_an_ignored_interrupt_is_gone() -> None:
    with interrupts_ignored():
        os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_holding_works_on_another_thread() -> None:
    outcomes: list[str] = []

    def hold() -> None:
        with interrupts_held():
            outcomes.append("ran")

    thread = threading.Thread(target=hold)
    thread.start()
    thread.join()
    assert outcomes == ["ran"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_sigterm_is_held_and_ignored_like_ctrl_c(number: int) -> None:
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        reached_end = False
        with pytest.raises(KeyboardInterrupt), interrupts_held():
            signal.raise_signal(number)
            reached_end = True
        assert reached_end
        with interrupts_ignored():
            signal.raise_signal(number)
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("background", [False, True])
def test_ctrl_c_during_imports_ends_without_a_word(background: bool) -> None:
    """Unless a shell has started the command in the background, with Ctrl-C ignored."""
    handler = "SIG_IGN" if background else "default_int_handler"
    code = (
        f"import signal\nsignal.signal(signal.SIGINT, signal.{handler})\n"
        "from pdray.interrupts import interrupts_end_the_process\n"
        "with interrupts_end_the_process():\n    signal.raise_signal(signal.SIGINT)\nprint('went on')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == ((0, "went on\n", "") if background else (130, "", ""))
