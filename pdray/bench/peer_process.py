"""An object in a process of its own, called over a pipe: for what needs two processes, or is to kill one."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import multiprocessing
import os
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

from pdray.errors import PdrayError
from pdray.event_loop import new_event_loop

CALL_TIMEOUT_S = 60.0
EXIT_TIMEOUT_S = 10.0


class PeerProcess:
    """Makes ``factory(*args)`` in a new process, on an event loop; its methods, async or not, are called one at a time.

    Args:
        factory: a class or function of a module, with arguments that can be pickled.
        environment: set for the process, from its first moment.
    """

    def __init__(self, factory: Callable[..., Any], *args: Any, environment: dict[str, str] | None = None) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, factory, args), daemon=True)
        with _environment(environment or {}):
            self._process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def call(self, method: str, *args: Any, timeout_s: float = CALL_TIMEOUT_S) -> Any:
        """Returns what it returns, raises what it raises.

        Raises:
            PdrayError: the process has ended, or has not answered in time.
        """
        self.post(method, *args)
        return self.result(method, timeout_s=timeout_s)

    def post(self, method: str, *args: Any) -> None:
        """Call without waiting; result() must follow."""
        with contextlib.suppress(BrokenPipeError):  # result() says that it has ended
            self._pipe.send((method, args))

    def result(self, method: str, *, timeout_s: float = CALL_TIMEOUT_S) -> Any:
        """The result of the last post()."""
        try:
            if not self._pipe.poll(timeout_s):
                raise PdrayError(f"process {self.pid} has not answered {method} within {timeout_s:g} s")
            error, value = self._pipe.recv()
        except (EOFError, ConnectionResetError) as lost:
            self._process.join(EXIT_TIMEOUT_S)
            raise PdrayError(f"process {self.pid} ended in {method} ({self._process.exitcode})") from lost
        if error is not None:
            raise error
        return value

    def kill(self) -> None:
        """SIGKILL, and see it gone."""
        self._process.kill()
        self._process.join()

    def stop(self) -> None:
        """End it in order; if that takes too long, kill it. Idempotent."""
        self._pipe.close()
        self._process.join(EXIT_TIMEOUT_S)
        if self._process.is_alive():
            self.kill()


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _serve(pipe: Connection, factory: Callable[..., Any], args: tuple[Any, ...]) -> None:
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(_answer(pipe, factory, args))


async def _answer(pipe: Connection, factory: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """Answer calls until the pipe is closed; then target.close()."""
    target = factory(*args)
    while True:
        try:
            method, arguments = await asyncio.to_thread(pipe.recv)
        except EOFError:
            break
        error, value = None, None
        try:
            value = getattr(target, method)(*arguments)
            if inspect.isawaitable(value):
                value = await value
        except Exception as raised:
            error, value = PdrayError(f"{method}: {type(raised).__name__}: {raised}"), None
        pipe.send((error, value))
    closed = target.close()
    if inspect.isawaitable(closed):
        await closed
