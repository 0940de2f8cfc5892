"""Load on a paced server, closed loop or Poisson, and the figures of what came back."""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Coroutine, Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from paced_engine import VOCAB_SIZE
from paced_process import PacedProcess, core_wait_seconds
from paced_server import MODEL
from streams import Answer, Body, Clients

NUM_PROMPT_TOKENS = 64
NUM_TOKENS = 64
WARM_UP_S = 2.0  # of each phase: the first answers take a while, and rates leave it out
REST_TIMEOUT_S = 30.0
REST_POLL_S = 0.1


class Cpu(NamedTuple):
    """Seconds per second: used, and waited for a core that other threads had."""

    used: float
    waited: float

    def __str__(self) -> str:
        return f"{self.used:.0%} (+{self.waited:.0%} waiting)"


class Sent(NamedTuple):
    """A request's time of time.monotonic(), and its answer."""

    sent_at: float
    answer: Answer


@dataclass(frozen=True, slots=True)
class Phase:
    """One load and its answers; times of time.monotonic().

    Attributes:
        ends_at: nothing was sent from then on; the last answers came later.
        client_cpu, server_cpu: over the whole phase; all threads together.
    """

    begins_at: float
    ends_at: float
    sent: list[Sent]
    client_cpu: Cpu
    server_cpu: Cpu

    @property
    def admitted(self) -> list[Sent]:
        """Those whose stream began."""
        return [each for each in self.sent if each.answer.status == 200]

    @property
    def refused(self) -> list[Sent]:
        """Those that got 429."""
        return [each for each in self.sent if each.answer.status == 429]

    @property
    def offered_per_s(self) -> float:
        return self._per_second(each.sent_at for each in self.sent)

    @property
    def completed_per_s(self) -> float:
        """Requests; of one that began before or ended after, the share of its tokens that came within."""
        completed = (each.answer.arrivals for each in self.admitted if each.answer.outcome == "finished")
        return sum(self._per_second(arrivals) / len(arrivals) for arrivals in completed if arrivals)

    @property
    def refused_per_s(self) -> float:
        return self._per_second(each.answer.finished_at for each in self.refused)

    def ttft_ms(self, percentile: float) -> float:
        return _percentile_ms(
            (e.answer.arrivals[0] - e.sent_at for e in self.admitted if e.answer.arrivals), percentile
        )

    def itl_ms(self, percentile: float) -> float:
        gaps = (after - before for e in self.admitted for before, after in pairwise(e.answer.arrivals))
        return _percentile_ms(gaps, percentile)

    def refusal_ms(self, percentile: float) -> float:
        return _percentile_ms((each.answer.finished_at - each.sent_at for each in self.refused), percentile)

    def _per_second(self, times: Iterable[float]) -> float:
        """How many of these times are in the phase, its warm-up left out."""
        begins_at = self.begins_at + WARM_UP_S
        return sum(begins_at <= each < self.ends_at for each in times) / (self.ends_at - begins_at)


def _percentile_ms(seconds: Iterable[float], percentile: float) -> float:
    """Not a number where there is nothing."""
    values = list(seconds)
    return 1e3 * float(np.percentile(values, percentile)) if values else float("nan")


class Load:
    """Sends streaming requests of 64 random prompt tokens, no two alike, and asks for 64 tokens each."""

    def __init__(self, server: PacedProcess, clients: Clients, seed: int = 0) -> None:
        self._server = server
        self._clients = clients
        self._rng = random.Random(seed)

    async def closed_loop(self, num_clients: int, duration_s: float) -> Phase:
        """So many clients, each of which sends its next request when it has its answer."""
        return await self._phase(duration_s, self._closed_loop(num_clients, duration_s))

    async def poisson(self, rate: float, duration_s: float) -> Phase:
        """So many requests a second on average, whatever comes back."""
        return await self._phase(duration_s, self._poisson(rate, duration_s))

    async def at_rest(self) -> dict[str, Any]:
        """What the server has in use, once that is nothing; or after a while, whatever it is."""
        until = time.monotonic() + REST_TIMEOUT_S
        while True:
            async with self._clients.session.get(f"{self._clients.url}/debug/integrity") as response:
                state: dict[str, Any] = await response.json()
            if not (state["leases"] or state["blocks_in_use"]) or time.monotonic() > until:
                return state
            await asyncio.sleep(REST_POLL_S)

    async def _phase(self, duration_s: float, load: Coroutine[Any, Any, list[Sent]]) -> Phase:
        begins_at, before = time.monotonic(), self._cpu_seconds()
        sent = await load
        lasted = time.monotonic() - begins_at
        shares = ((now - then) / lasted for now, then in zip(self._cpu_seconds(), before, strict=True))
        client_used, client_waited, server_used, server_waited = shares
        client_cpu, server_cpu = Cpu(client_used, client_waited), Cpu(server_used, server_waited)
        return Phase(begins_at, begins_at + duration_s, sent, client_cpu, server_cpu)

    def _cpu_seconds(self) -> tuple[float, float, float, float]:
        """Used and waited by the client, used and waited by the server."""
        server = self._server
        server_waited = core_wait_seconds(server.process.pid)
        return time.process_time(), core_wait_seconds(os.getpid()), server.cpu_seconds(), server_waited

    async def _closed_loop(self, num_clients: int, duration_s: float) -> list[Sent]:
        until = time.monotonic() + duration_s

        async def client(number: int) -> list[Sent]:
            sent = []
            await asyncio.sleep(number / num_clients * WARM_UP_S)  # together they would start, and end, in one step
            while time.monotonic() < until:
                sent.append(await self._ask())
            return sent

        return [each for sent in await asyncio.gather(*map(client, range(num_clients))) for each in sent]

    async def _poisson(self, rate: float, duration_s: float) -> list[Sent]:
        begins_at, arrival = time.monotonic(), self._rng.expovariate(rate)
        tasks: list[asyncio.Task[Sent]] = []
        while arrival < duration_s:
            await asyncio.sleep(begins_at + arrival - time.monotonic())
            tasks.append(asyncio.create_task(self._ask()))
            arrival += self._rng.expovariate(rate)
        return await asyncio.gather(*tasks)

    async def _ask(self) -> Sent:
        body = self._body()
        return Sent(time.monotonic(), await self._clients.ask(body))

    def _body(self) -> Body:
        return {
            "model": MODEL,
            "prompt": [self._rng.randrange(VOCAB_SIZE) for _ in range(NUM_PROMPT_TOKENS)],
            "max_tokens": NUM_TOKENS,
            "temperature": 0.0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
