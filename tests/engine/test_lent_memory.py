"""Memory of one process in another: real processes on the host."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from pdray.engine.kv.lent_memory import HostMemory
from pdray.errors import OutOfMemoryError, TransferError

NUM_BYTES = 10_000
LENDER = f"""
import sys
from pdray.engine.kv.lent_memory import HostMemory
memory = HostMemory()
other, lent = memory.allocate(100), memory.allocate({NUM_BYTES})
lent[77] = 5
print(memory.lend(lent[:10]), flush=True)
sys.stdin.readline()
print(int(lent[78]), flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def lender() -> Iterator[subprocess.Popen[str]]:
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", LENDER], stdin=pipe, stdout=pipe, text=True)
    yield process
    process.kill()
    process.communicate()


def handle_of(lender: subprocess.Popen[str]) -> str:
    assert lender.stdout is not None
    return lender.stdout.readline().strip()


def test_what_one_process_writes_the_other_reads(lender: subprocess.Popen[str]) -> None:
    """Both ways; and what was mapped outlives the process that has lent it, but cannot be mapped again."""
    handle = handle_of(lender)
    borrowed = HostMemory().borrow(handle, NUM_BYTES)
    assert borrowed.shape == (NUM_BYTES,) and int(borrowed[77]) == 5 and int(borrowed.sum()) == 5
    borrowed[78] = 9
    assert lender.stdin is not None and lender.stdout is not None
    lender.stdin.write("\n")
    lender.stdin.flush()
    assert lender.stdout.readline() == "9\n"
    lender.send_signal(signal.SIGKILL)
    lender.wait()
    assert int(borrowed[77]) == 5
    borrowed[79] = 1
    with pytest.raises(
        TransferError, match=f"memory of process {lender.pid} cannot be mapped: .*set channel to object_store"
    ):
        HostMemory().borrow(handle, NUM_BYTES)


def test_a_handle_fits_one_piece_of_memory_only(lender: subprocess.Popen[str]) -> None:
    """Of another size, another name, or whatever else has the descriptor's number now."""
    pid, number, name = handle_of(lender).split(":")
    for wrong, size in ((f"{pid}:{number}:{name}", NUM_BYTES + 1), (f"{pid}:{int(number) - 1}:{name}", 100)):
        with pytest.raises(TransferError, match=f"not {size} bytes of {name}"):
            HostMemory().borrow(wrong, size)
    with pytest.raises(TransferError, match="cannot be mapped|not 100 bytes"):
        HostMemory().borrow(f"{pid}:0:{name}", 100)


def test_more_than_there_can_be_is_refused() -> None:
    before = os.listdir("/proc/self/fd")
    with pytest.raises(OutOfMemoryError, match="bytes of shared memory could not be allocated"):
        HostMemory().allocate(2**62)
    assert len(os.listdir("/proc/self/fd")) == len(before)
