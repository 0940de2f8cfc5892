"""Answers that are handed over while clients leave and the prefill worker is killed again and again.

While it is away there is nobody to begin a request: those who come then are refused, and ask again.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections import Counter
from dataclasses import dataclass, field

from application import Application, seconds_until
from deaths import BACK_TIMEOUT_S, Stories, differences, with_problems
from rows import Row
from scale import Scale
from streams import MODEL, Answer, Body, Clients, new_session

SEED = 3
NUM_BODIES = 50
NUM_CLIENTS = 16
REQUESTS_PER_KILL = 50
LEAVING = 0.3
MAX_PROMPT_TOKENS = 400
MAX_TOKENS = 24
MAX_PAUSE_S = 1.0  # before a refused client asks again


@dataclass(slots=True)
class Handovers:
    """NUM_CLIENTS clients that share a budget of requests, and who kills the prefill worker.

    Attributes:
        expected: what each body is answered undisturbed.
        ended: requests, by outcome. problems: answers that were lost, or not those.
    """

    app: Application
    clients: Clients
    bodies: list[Body]
    expected: Stories
    num_requests: int
    rng: random.Random = field(default_factory=lambda: random.Random(SEED))
    ended: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    num_refusals: int = 0
    num_kills: int = 0

    async def run(self) -> None:
        """Returns when all requests have ended."""
        killing = asyncio.ensure_future(self._keep_killing())
        await asyncio.gather(*(self._client() for _ in range(NUM_CLIENTS)))
        killing.cancel()
        await asyncio.gather(killing, return_exceptions=True)

    async def _client(self) -> None:
        while self.num_requests > 0:
            self.num_requests -= 1
            number = self.rng.randrange(NUM_BODIES)
            leaves = self.rng.random()
            after_s = self.rng.uniform(0.0, 2.0) if leaves < LEAVING / 2 else None
            after = self.rng.randint(1, 8) if LEAVING / 2 <= leaves < LEAVING else None
            answer = await self.clients.ask(self.bodies[number], leave_after_s=after_s, leave_after=after)
            deadline = time.monotonic() + BACK_TIMEOUT_S
            while answer.outcome == "refused" and answer.retry_after_s and time.monotonic() < deadline:
                self.num_refusals += 1
                await asyncio.sleep(min(answer.retry_after_s, MAX_PAUSE_S))
                answer = await self.clients.ask(self.bodies[number], leave_after_s=after_s, leave_after=after)
            self._note(number, answer)

    def _note(self, number: int, answer: Answer) -> None:
        self.ended[answer.outcome] += 1
        if answer.outcome != "left":
            self.problems += [f"body {number}, {each}" for each in differences([answer], [self.expected[number]])]
        elif not self.expected[number].texts[0].startswith(answer.texts.get(0, "")):
            self.problems.append(f"body {number} said something else before its client left")

    async def _keep_killing(self) -> None:
        """After every REQUESTS_PER_KILL requests that have ended; one that comes back late is killed late."""
        while True:
            while self.ended.total() < REQUESTS_PER_KILL * (self.num_kills + 1):
                await asyncio.sleep(0.02)
            pid = (await self.app.pids()).get("prefill-0")
            if pid is None:
                await asyncio.sleep(0.2)
                continue
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:  # the last one, not replaced yet
                await asyncio.sleep(0.2)
                continue
            self.num_kills += 1


def make_bodies() -> list[Body]:
    """Streams from prompts of all lengths; even ones greedy, odd ones seeded."""
    rng = random.Random(SEED)
    return [
        {
            "model": MODEL,
            "prompt": [rng.randrange(100, 40_000) for _ in range(rng.randint(1, MAX_PROMPT_TOKENS))],
            "max_tokens": rng.randint(2, MAX_TOKENS),
            "temperature": 0.8 if number % 2 else 0.0,
            "seed": number,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        for number in range(NUM_BODIES)
    ]


async def handovers(app: Application, scale: Scale) -> list[Row]:
    """A row for what became of every request, and one for what is left in use."""
    bodies = make_bodies()
    async with new_session() as session:
        clients = Clients(app.url, session)
        expected = [await clients.ask(body) for body in bodies]
        state = Handovers(app, clients, bodies, expected, scale.num_handovers)
        began = time.monotonic()
        await state.run()
        lasted = time.monotonic() - began
        back = await seconds_until(lambda: app.whole(set()), time.monotonic(), BACK_TIMEOUT_S)
        at_rest = await app.problems_at_rest()
    ended = ", ".join(f"{number} {name}" for name, number in state.ended.most_common())
    figure = f"{state.ended.total()} requests in {lasted:.0f} s, {state.num_kills} kills: {ended}"
    figure += f"; asked again {state.num_refusals} times"
    enough = state.num_kills >= scale.num_handovers // REQUESTS_PER_KILL - 1
    rows = [
        Row(
            f"handovers, prefill worker killed after every {REQUESTS_PER_KILL}",
            with_problems(figure, state.problems),
            "all but those whose client left finish, with the text of an undisturbed run",
            enough and not state.problems,
        )
    ]
    figure = f"all back {back:.1f} s after the last request"
    return [*rows, Row("handovers, afterwards", with_problems(figure, at_rest), "nothing in use", not at_rest)]
