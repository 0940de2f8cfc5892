"""Starts the kernel checks in Triton's interpreter early: they take some minutes of a core's time.

Before the first test; where several processes share the tests (pytest-xdist), when one of them comes to the checks.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
STARTED: pytest.StashKey[dict[str, subprocess.Popen[str]]] = pytest.StashKey()


def start(name: str) -> subprocess.Popen[str]:
    """A file of checks, in a process of its own: triton must be imported for its interpreter."""
    env = os.environ | {"PYTHONPATH": str(FOLDER.parents[1])}
    command = ["nice", "-n", "10", sys.executable, "-W", "ignore", str(FOLDER / "interpreted.py"), name]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def pytest_collection_finish(session: pytest.Session) -> None:
    if not session.config.option.collectonly and not hasattr(session.config, "workerinput"):
        start_all(session)


def start_all(session: pytest.Session) -> None:
    """Every file of checks that this session is to run; once."""
    if STARTED not in session.config.stash:
        names = {item.callspec.params["interpreted"] for item in session.items if _is_interpreted(item)}  # type: ignore[attr-defined]
        can_run = find_spec("triton") is not None
        session.config.stash[STARTED] = {name: start(name) for name in sorted(names) if can_run}


def pytest_sessionfinish(session: pytest.Session) -> None:
    for process in session.config.stash.get(STARTED, {}).values():
        process.kill()


def _is_interpreted(item: pytest.Item) -> bool:
    return "interpreted" in getattr(getattr(item, "callspec", None), "params", {})


@pytest.fixture
def interpreting(request: pytest.FixtureRequest) -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    """The process that was started for a file of checks."""
    start_all(request.session)
    yield lambda name: request.config.stash[STARTED][name]
