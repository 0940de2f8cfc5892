"""Starts the kernel checks in Triton's interpreter with the session: they take minutes of a core's time, and get what
the other tests leave, which is most while those that start clusters wait.

Where several processes share the tests (pytest-xdist) the first of them starts the checks, and whichever comes to them
reads what they have written.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest

FOLDER = Path(__file__).parent
STARTED: pytest.StashKey[list[subprocess.Popen[bytes]]] = pytest.StashKey()
LIMIT_S = 800.0
# Output goes to $0.output; $0.status appears once the checks have ended, and holds their exit status.
SCRIPT = '"$@" >"$0.output" 2>&1; echo $? >"$0.part"; mv "$0.part" "$0.status"'


class Checked(NamedTuple):
    """What a file of checks printed, and its exit status."""

    output: str
    status: int


def place(config: Any, name: str) -> Path:
    """Where a file of checks writes, in every process of one run of pytest; the suffixes are still missing."""
    run = config.workerinput["testrunuid"] if hasattr(config, "workerinput") else os.getpid()
    return Path(tempfile.gettempdir()) / f"pdray-interpreted-{run}" / name


def start(config: Any, name: str) -> subprocess.Popen[bytes]:
    """A file of checks, in a process of its own: TRITON_INTERPRET must be set before triton is imported."""
    to = place(config, name)
    to.parent.mkdir(exist_ok=True)
    env = os.environ | {"PYTHONPATH": str(FOLDER.parents[1]), "TRITON_INTERPRET": "1"}
    command = ["nice", "-n", "19", "sh", "-c", SCRIPT, str(to), sys.executable, "-W", "ignore", str(FOLDER / name)]
    return subprocess.Popen(command, env=env, process_group=0)


def pytest_collection_finish(session: pytest.Session) -> None:
    is_first = getattr(session.config, "workerinput", {"workerid": "gw0"})["workerid"] == "gw0"
    if is_first and not session.config.option.collectonly and find_spec("triton") is not None:
        names = {item.callspec.params["interpreted"] for item in session.items if _is_interpreted(item)}  # type: ignore[attr-defined]
        session.config.stash[STARTED] = [start(session.config, name) for name in sorted(names)]


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Another process may still wait for checks: they are ended only with an interrupted run."""
    for process in session.config.stash.get(STARTED, []):
        if exitstatus == pytest.ExitCode.INTERRUPTED:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(LIMIT_S)
    with contextlib.suppress(OSError):  # not there, or not all was read
        place(session.config, "").rmdir()


def _is_interpreted(item: pytest.Item) -> bool:
    return "interpreted" in getattr(getattr(item, "callspec", None), "params", {})


@pytest.fixture
def interpreting(request: pytest.FixtureRequest) -> Callable[[str], Checked]:
    """Waits for a file of checks."""

    def checked(name: str) -> Checked:
        path, deadline = place(request.config, name), time.monotonic() + LIMIT_S
        output, status = path.with_name(f"{name}.output"), path.with_name(f"{name}.status")
        while not status.exists():
            assert time.monotonic() < deadline, f"{name} has not ended: {output.read_text()}"
            time.sleep(0.1)
        found = Checked(output.read_text(), int(status.read_text()))
        output.unlink()
        status.unlink()
        return found

    return checked
