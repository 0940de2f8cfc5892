"""The process of a rank other than 0, in this one."""

from __future__ import annotations

import multiprocessing
import os
import signal
from typing import Any, NoReturn

import pytest

from pdray.ranks import process


class Ended(BaseException):
    """Stands for the end of the process."""


class Held:
    """Stands for a communicator, whose destruction may take for ever."""

    num_alive = 0

    def __init__(self) -> None:
        Held.num_alive += 1

    def __del__(self) -> None:
        Held.num_alive -= 1


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_destroyed_before_the_process_ends(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[int] = []

    def make_rank(*_: Any) -> process.Rank:
        lane: Any = Held()
        if fails:
            raise RuntimeError("it does not fit")
        return process.Rank(lane, print)

    def end(status: int) -> NoReturn:
        alive.append(Held.num_alive)
        assert status == int(fails)
        raise Ended

    monkeypatch.setattr(process, "make_rank", make_rank)
    monkeypatch.setattr(process, "decode", bytes)
    monkeypatch.setattr(process, "die_with", lambda parent: None)
    monkeypatch.setattr(process, "log_to_stderr", lambda: None)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(os, "_exit", end)
    ours, theirs = multiprocessing.Pipe()
    others = [multiprocessing.Pipe() for _ in range(2)]
    ours.send_bytes(b"setup")
    ours.send_bytes(b"")
    with pytest.raises(Ended):
        process.main(os.getppid(), *(os.dup(end.fileno()) for end in (theirs, theirs, others[0][0], others[1][0])))
    assert alive == [1]
    if fails:
        assert ours.recv_bytes() == b"RuntimeError: it does not fit"
