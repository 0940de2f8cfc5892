"""What keeps an application from serving: which errors end a start, and which reason is shown."""

from __future__ import annotations

import pytest

from pdray.control.startup import MAX_OUT_OF_MEMORY, StartState, Startup
from pdray.errors import (
    ConfigError,
    HandshakeError,
    ModelLoadError,
    OutOfMemoryError,
    PdrayError,
    PlacementError,
    TransferError,
    WorkerDiedError,
)


@pytest.mark.parametrize("kind", [ConfigError, ModelLoadError, HandshakeError, PlacementError])
def test_what_trying_again_cannot_help_is_final(kind: type[PdrayError]) -> None:
    startup = Startup()
    startup.failed("decode-0", "decode-0 did not start: so it is", kind("so it is"))
    state = startup.state(ready=False)
    assert state.failed == state.reason == "decode-0 did not start: so it is" and state.kind == kind.__name__
    startup.cleared("decode-0")
    assert startup.state(ready=False) == StartState(False)


@pytest.mark.parametrize("error", [RuntimeError("x"), TimeoutError(), WorkerDiedError("x"), TransferError("x")])
def test_what_may_pass_is_a_reason_only(error: Exception) -> None:
    startup = Startup()
    for _ in range(10):
        startup.failed("decode-0", "decode-0 did not start: x", error)
    assert startup.state(ready=False) == StartState(False, reason="decode-0 did not start: x")
    assert startup.state(ready=True) == StartState(True)


def test_memory_may_be_freed_yet() -> None:
    startup = Startup()
    for number in range(1, MAX_OUT_OF_MEMORY + 1):
        startup.failed("decode-0", "too little", OutOfMemoryError("too little"))
        assert bool(startup.state(ready=False).failed) == (number == MAX_OUT_OF_MEMORY)
    other = Startup()
    for _ in range(MAX_OUT_OF_MEMORY):
        other.failed("decode-0", "too little", OutOfMemoryError("too little"))
        other.failed("decode-0", "it died", RuntimeError("it died"))
    assert not other.state(ready=False).failed


def test_a_wait_is_shown_once_and_before_errors_that_pass() -> None:
    startup = Startup()
    startup.failed("prefill-0", "prefill-0 did not start: x", RuntimeError("x"))
    assert startup.waits("decode-0", "no CPU is free") and startup.waits("decode-1", "no CPU is free")
    assert not startup.waits("decode-0", "no CPU is free")
    assert startup.state(ready=False).reason == "no CPU is free; prefill-0 did not start: x"
    assert startup.waits("decode-0", "") and startup.waits("decode-1", "")
    assert startup.state(ready=False).reason == "prefill-0 did not start: x"
