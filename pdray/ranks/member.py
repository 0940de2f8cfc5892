"""One other rank of a worker, as rank 0 sees it: a process, and a pipe to it."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future

from pdray.background import start_thread
from pdray.errors import PdrayError, RankDiedError

EXIT_TIMEOUT_S = 10.0  # for a process that has closed its pipe, or was told to end


class Member:
    """Starts the process. Any thread may call what is here.

    The process is no Ray actor: it needs no place of its own (the worker's has its GPU), no name, and no table that
    knows it, because the kernel ends it with the worker's process, however that ends.

    Args:
        environment: of the process. inputs: descriptor of the memory that steps' inputs lie in.
        on_end: called on a thread of its own, once, with why the process has ended, unless close() came first.

    Attributes:
        kv_orders: its end of what KV orders and their answers go by; see RankPools.
    """

    def __init__(
        self, rank: int, environment: dict[str, str], inputs: int, on_end: Callable[[RankDiedError], None]
    ) -> None:
        self.rank = rank
        self._on_end = on_end
        self._connection, theirs = multiprocessing.Pipe()
        self.kv_orders, their_orders = multiprocessing.Pipe()
        self._process: subprocess.Popen[bytes] | None = None
        self._why_killed = ""
        self._closing = threading.Event()
        self._started: Future[int] = Future()

        def watch() -> None:
            inherited = theirs.fileno(), inputs, their_orders.fileno()
            module = [sys.executable, "-m", "pdray.ranks.process"]
            command = [*module, *map(str, (os.getpid(), *inherited))]
            try:
                with theirs, their_orders:
                    process = subprocess.Popen(command, env=environment, pass_fds=inherited, stdin=subprocess.DEVNULL)
            except BaseException as error:
                return self._started.set_exception(error)
            self._process = process
            self._started.set_result(process.pid)
            self._watch(process)

        # The kernel ends the process with the thread that started it, which therefore lasts as long.
        self._thread = start_thread(f"rank-{rank}", watch, self._failed)

    @property
    def pid(self) -> int:
        """Raises OSError: it could not be started."""
        return self._started.result()

    def send(self, message: bytes) -> None:
        """Raises:
        RankDiedError: it has ended.
        """
        try:
            self._connection.send_bytes(message)
        except OSError as error:
            raise RankDiedError(f"rank {self.rank} (process {self.pid}) has ended: {error}") from error

    def kill(self, why: str) -> None:
        """End it, because it hangs. What follows is as when it is killed by somebody else."""
        self._why_killed = self._why_killed or why
        if self._process is not None:
            self._process.kill()

    def close(self) -> None:
        """End it, and see it gone. Idempotent."""
        if not self._closing.is_set():
            self._closing.set()
            if self._thread.is_alive():
                with contextlib.suppress(RankDiedError):  # the thread sees to the rest
                    self.send(b"")
        self._thread.join(EXIT_TIMEOUT_S)
        if self._thread.is_alive():
            self.kill("it does not end")
            self._thread.join()
        self.kv_orders.close()

    def _watch(self, process: subprocess.Popen[bytes]) -> None:
        """Return when it has ended."""
        reason = ""
        try:
            while not self._closing.is_set():
                reason = self._connection.recv_bytes().decode()
        except (EOFError, OSError):
            pass  # it has closed its end
        try:
            status = process.wait(EXIT_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            status = process.wait()
        if not self._closing.is_set():
            was_killed = status < 0 and not reason
            what = reason or self._why_killed or (f"signal {-status}" if was_killed else f"status {status}")
            text = f"rank {self.rank} (process {process.pid}) has ended: {what}"
            self._on_end(RankDiedError(text, was_killed=was_killed))

    def _failed(self, error: BaseException) -> None:
        self._on_end(RankDiedError(f"rank {self.rank} is not watched any more: {error!r}"))


def member_environment(gpus: list[str]) -> dict[str, str]:
    """This process's environment, in which another finds the same modules.

    Args:
        gpus: that it is to see, as CUDA_VISIBLE_DEVICES names them, its own first; none: as here.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    return environment | ({"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {})


def check_visible(gpus: list[str], size: int) -> None:
    """Raises:
    PdrayError: this process sees too few GPUs for so many ranks.
    """
    if len(gpus) < size:
        raise PdrayError(
            f"tensor_parallel_size is {size}, but this process sees {len(gpus)} GPUs ({', '.join(gpus) or 'none'}); "
            "lower it, or see CUDA_VISIBLE_DEVICES"
        )
