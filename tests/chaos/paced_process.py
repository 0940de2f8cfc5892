"""A paced server as a process of its own, and what it costs."""

from __future__ import annotations

import select
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

SERVER = Path(__file__).with_name("paced_server.py")
START_TIMEOUT_S = 120.0
EXIT_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class PacedProcess:
    """A server that is ready."""

    url: str
    process: psutil.Process

    def rss_mib(self) -> float:
        return float(self.process.memory_info().rss) / 2**20

    def cpu_seconds(self) -> float:
        """Of all its threads, since it began."""
        times = self.process.cpu_times()
        return float(times.user + times.system)


def core_wait_seconds(pid: int) -> float:
    """How long a process's threads were ready to run while other threads had the cores, since it began (Linux)."""
    stats = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(stat.read_text().split()[1]) for stat in stats) / 1e9


@contextmanager
def paced_process(**options: float) -> Iterator[PacedProcess]:
    """A server on a free port of this machine; ended on leaving.

    Args:
        options: of paced_server.py, with underscores.

    Raises:
        RuntimeError: it did not become ready.
    """
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    with subprocess.Popen([sys.executable, SERVER, *arguments], stdout=subprocess.PIPE, text=True) as server:
        try:
            yield PacedProcess(_ready_url(server), psutil.Process(server.pid))
        finally:
            server.terminate()
            try:
                server.wait(EXIT_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                server.kill()


def _ready_url(server: subprocess.Popen[str]) -> str:
    assert server.stdout is not None
    readable, _, _ = select.select([server.stdout], [], [], START_TIMEOUT_S)
    line = server.stdout.readline() if readable else ""
    word, _, url = line.strip().partition(" ")
    if word != "ready":
        raise RuntimeError(f"{SERVER.name} was not ready within {START_TIMEOUT_S:g} s, or has ended: {line!r}")
    return url
