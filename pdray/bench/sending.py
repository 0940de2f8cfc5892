"""Sending requests at their arrival times, from this process or from several."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import aiohttp
from tqdm import tqdm

from pdray.bench.client import authorization, send_request
from pdray.bench.peer_process import PeerProcess
from pdray.bench.serving_metrics import RequestRecord
from pdray.bench.workload import BenchRequest

START_DELAY_S = 0.2  # for the word to reach every process
MARGIN_S = 60.0  # beyond the last arrival's time limit


class Target(NamedTuple):
    """Where requests go.

    Attributes:
        url: of the completions endpoint.
        timeout_s: for one request.
    """

    url: str
    model: str
    ignore_eos: bool
    timeout_s: float


class Sent(NamedTuple):
    """Records in the requests' order, and the seconds from the start until the last answer's end."""

    records: list[RequestRecord]
    duration_s: float


def new_session(timeout_s: float) -> aiohttp.ClientSession:
    """Without a limit on connections, and with the API key that the environment holds."""
    return aiohttp.ClientSession(
        headers=authorization(),
        timeout=aiohttp.ClientTimeout(total=timeout_s),
        connector=aiohttp.TCPConnector(limit=0),
        read_bufsize=2**18,
    )


async def send_all(
    requests: list[BenchRequest],
    send: Callable[[BenchRequest], Any],
    max_concurrency: int | None = None,
    *,
    show_progress: bool = False,
    started_at: float | None = None,
) -> list[RequestRecord]:
    """Send each request at its arrival time, or later if max_concurrency are in flight.

    Records come in the order of the requests.

    Args:
        started_at: time of time.monotonic() that arrivals count from; default: now.
    """
    places = asyncio.Semaphore(max_concurrency or max(1, len(requests)))
    started = time.monotonic() if started_at is None else started_at

    async def send_one(request: BenchRequest, progress: tqdm[Any]) -> RequestRecord:
        async with places:
            lateness = time.monotonic() - started - request.arrival_s
            record: RequestRecord = await send(request)
        record.lateness = max(0.0, lateness)
        progress.update(1)
        return record

    tasks = []
    with tqdm(total=len(requests), disable=not show_progress, dynamic_ncols=True) as progress:
        async with asyncio.TaskGroup() as group:
            for request in requests:
                delay = started + request.arrival_s - time.monotonic()
                if delay > 0:
                    await asyncio.sleep(delay)
                tasks.append(group.create_task(send_one(request, progress)))
    return [task.result() for task in tasks]


async def send_from_here(
    requests: list[BenchRequest],
    target: Target,
    max_concurrency: int | None = None,
    *,
    show_progress: bool = False,
    started_at: float | None = None,
) -> Sent:
    """Send everything from this process; see send_all."""
    async with new_session(target.timeout_s) as session:

        async def send(request: BenchRequest) -> RequestRecord:
            return await send_request(session, target.url, target.model, request, ignore_eos=target.ignore_eos)

        started = time.monotonic() if started_at is None else started_at
        records = await send_all(requests, send, max_concurrency, show_progress=show_progress, started_at=started)
        return Sent(records, time.monotonic() - started)


class Sender:
    """Sends one process's share; lives in that process."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._requests: list[BenchRequest] = []

    def prepare(self, requests: list[BenchRequest]) -> None:
        """Take the requests, so that nothing but their arrival decides when they are sent."""
        self._requests = requests

    async def send(self, started_at: float) -> list[RequestRecord]:
        """Send what was prepared."""
        return (await send_from_here(self._requests, self._target, started_at=started_at)).records

    def close(self) -> None:
        """Nothing is held between calls."""


def send_from_processes(requests: list[BenchRequest], target: Target, num_processes: int) -> Sent:
    """Send the requests in turn from so many processes, which count time from the same moment.

    Raises:
        PdrayError: a process has ended, or has not answered in time.
    """
    with contextlib.ExitStack() as stack:
        senders = []
        for _ in range(num_processes):
            senders.append(PeerProcess(Sender, target))
            stack.callback(senders[-1].stop)
        for index, sender in enumerate(senders):
            sender.post("prepare", requests[index::num_processes])
        for sender in senders:
            sender.result("prepare")
        started = time.monotonic() + START_DELAY_S
        for sender in senders:
            sender.post("send", started)
        limit_s = START_DELAY_S + requests[-1].arrival_s + target.timeout_s + MARGIN_S
        shares: list[list[RequestRecord]] = [sender.result("send", timeout_s=limit_s) for sender in senders]
        duration_s = time.monotonic() - started
    records: list[RequestRecord] = [RequestRecord(0)] * len(requests)
    for index, share in enumerate(shares):
        records[index::num_processes] = share
    return Sent(records, duration_s)
