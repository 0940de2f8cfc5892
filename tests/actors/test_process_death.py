"""When a process counts as gone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil

from pdray.actors.process_death import _kill_and_wait
from pdray.ranks.member import process_name

# Its first thread ends, as when it is killed while another one is still in a driver; ps says that it is a zombie.
LEADER_ENDS = """
import ctypes, sys, threading, time
libc = ctypes.CDLL(None)
libc.prctl(15, sys.argv[1].encode(), 0, 0, 0)
threading.Thread(target=time.sleep, args=(600,)).start()
print("ready", flush=True)
libc.syscall(60, 0)
"""


def start(name: str) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", LEADER_ENDS, name], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE:
        pass
    return process


def test_a_process_is_gone_when_its_last_thread_is() -> None:
    """Its GPU works until then."""
    process = start("ray::Test")
    assert len(list(Path(f"/proc/{process.pid}/task").iterdir())) == 2
    _kill_and_wait(process.pid, 0.01)
    assert psutil.Process(process.pid).num_threads() <= 1
    assert process.wait(10) == -9


HAS_A_CHILD = """
import ctypes, subprocess, sys, time
ctypes.CDLL(None).prctl(15, b"ray::Test", 0, 0, 0)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], stdout=subprocess.DEVNULL)
print(child.pid, flush=True)
time.sleep(600)
"""


def test_what_it_has_started_is_gone_with_it() -> None:
    """The other ranks of a worker hold memory of their GPUs."""
    with subprocess.Popen([sys.executable, "-c", HAS_A_CHILD], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        _kill_and_wait(process.pid, 0.01)
        assert process.wait(10) == -9
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE


def test_ranks_of_a_process_that_is_gone_already_are_seen_dead() -> None:
    """They may still write into memory that another worker has lent; nobody is their parent any more."""
    rank_0 = subprocess.Popen([sys.executable, "-c", "pass"])
    rank_0.wait(10)
    rank, other = start(process_name(rank_0.pid)), start(process_name(rank_0.pid + 1))
    _kill_and_wait(rank_0.pid, 0.01)
    assert psutil.Process(rank.pid).num_threads() <= 1 and rank.wait(10) == -9
    assert psutil.Process(other.pid).num_threads() == 2
    other.kill()
    other.wait(10)


def test_somebody_elses_process_is_left_alone() -> None:
    process = start("somebody")
    _kill_and_wait(process.pid, 0.01)
    assert psutil.Process(process.pid).num_threads() == 2
    process.kill()
    process.wait(10)
