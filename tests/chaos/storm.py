"""Everything at once: random requests, clients that leave in any state, and workers that die all the time."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections import Counter
from dataclasses import dataclass, field

from application import Application, seconds_until
from deaths import BACK_TIMEOUT_S, differences, with_problems
from metrics import counted
from rows import Row
from scale import Scale
from streams import Answer, Body, Clients, anything, new_session

SEED = 1
NUM_CLIENTS = 24
MAX_THINK_S = 2.0
MAX_PROMPT_TOKENS = 100
MAX_TOKENS = 64
NUM_ASKED_AGAIN = 40


@dataclass(slots=True)
class Asked:
    """A request and what came of it."""

    body: Body
    answer: Answer


@dataclass(slots=True)
class Storm:
    """NUM_CLIENTS clients that share a budget of requests."""

    clients: Clients
    num_requests: int
    until: float
    rng: random.Random = field(default_factory=lambda: random.Random(SEED))
    asked: list[Asked] = field(default_factory=list)

    async def run(self) -> None:
        """Returns when the requests, or the time for them, are used up and all have ended."""
        await asyncio.gather(*(self._client() for _ in range(NUM_CLIENTS)))

    async def _client(self) -> None:
        while self.num_requests > 0 and time.monotonic() < self.until:
            self.num_requests -= 1
            body = anything(self.rng, MAX_PROMPT_TOKENS, MAX_TOKENS)
            if self.rng.random() < 0.02:
                body["prompt"] = [100] * 600
            leaves = self.rng.random()
            after_s = self.rng.uniform(0.0, 3.0) ** 2 / 3 if leaves < 0.15 else None
            after = self.rng.randint(1, 20) if 0.15 <= leaves < 0.3 and body["stream"] else None
            answer = await self.clients.ask(body, leave_after_s=after_s, leave_after=after)
            self.asked.append(Asked(body, answer))
            await asyncio.sleep(max(self.rng.uniform(0.0, MAX_THINK_S), answer.retry_after_s or 0.0))


async def storm(app: Application, scale: Scale) -> list[Row]:
    """Three rows: how every request ended, what is left in use, and whether the metrics agree."""
    async with new_session() as session:
        clients = Clients(app.url, session)
        state = Storm(clients, scale.num_storm_requests, time.monotonic() + scale.max_storm_s)
        killed: list[str] = []
        killing = asyncio.ensure_future(_keep_killing(app, scale.kill_interval_s, killed))
        began = time.monotonic()
        await state.run()
        lasted = time.monotonic() - began
        killing.cancel()
        await asyncio.gather(killing, return_exceptions=True)
        back = await seconds_until(lambda: app.whole(set()), time.monotonic(), BACK_TIMEOUT_S)
        at_rest = await app.problems_at_rest()
        outcomes = await counted()
        again = await _ask_again(clients, state.asked)
    ended = Counter(asked.answer.outcome for asked in state.asked)
    problems = _badly_ended(state.asked) + again
    figure = f"{len(state.asked)} requests in {lasted:.0f} s, {len(killed)} kills: {_listed(ended)}"
    rows = [Row("storm", with_problems(figure, problems), "each ends once; asked again, same text", not problems)]
    figure = f"all back {back:.1f} s after the last request"
    rows.append(Row("storm, afterwards", with_problems(figure, at_rest), "integrity; nothing in use", not at_rest))
    return [*rows, _metrics_row(state.asked, outcomes)]


async def _keep_killing(app: Application, interval_s: float, killed: list[str]) -> None:
    rng = random.Random(SEED)
    while True:
        await asyncio.sleep(rng.uniform(0.5, 1.5) * interval_s)
        workers = {name: row["pid"] for name, row in (await app.workers()).items() if "pid" in row}
        if workers:
            victim = rng.choice(sorted(workers))
            try:
                os.kill(workers[victim], signal.SIGKILL)
            except ProcessLookupError:
                continue
            killed.append(victim)


def _badly_ended(asked: list[Asked]) -> list[str]:
    problems = []
    for number, (body, answer) in enumerate((each.body, each.answer) for each in asked):
        match answer.outcome:
            case "hung" | "cut" | "broken" as outcome:
                problems.append(f"request {number} {outcome}: {answer.error}")
            case "refused" if not answer.retry_after_s:
                problems.append(f"request {number} got {answer.status} without Retry-After")
            case "finished" if sorted(answer.texts) != list(range(body["n"])) or answer.num_tokens is None:
                problems.append(f"request {number} ended without its {body['n']} completions: {sorted(answer.texts)}")
            case "finished" if any(answer.num_reasons[index] != 1 for index in range(body["n"])):
                problems.append(f"request {number} ended {dict(answer.num_reasons)} times")
    return problems


async def _ask_again(clients: Clients, asked: list[Asked]) -> list[str]:
    """Differences between what some finished requests said in the storm and what they say now."""
    finished = [each for each in asked if each.answer.outcome == "finished"]
    some = random.Random(SEED).sample(finished, min(NUM_ASKED_AGAIN, len(finished)))
    places = asyncio.Semaphore(NUM_CLIENTS)

    async def once_more(each: Asked) -> Answer:
        async with places:
            return await clients.ask(each.body)

    now = await asyncio.gather(*(once_more(each) for each in some))
    return differences(now, [each.answer for each in some])


def _metrics_row(asked: list[Asked], outcomes: Counter[str]) -> Row:
    """A request of a client that left before any answer may not have reached the router."""
    answers = [each.answer for each in asked]
    ended = Counter(answer.outcome for answer in answers)
    unsure = sum(answer.outcome == "left" and answer.status is None for answer in answers)
    total, sure = sum(outcomes.values()), len(answers) - unsure
    pairs = {
        "finished": (outcomes["stop"] + outcomes["length"], ended["finished"], ended["left"]),
        "refused or invalid": (outcomes["rejected"], ended["refused"] + ended["invalid"], unsure),
        "all": (total, sure, unsure),
    }
    problems = [
        f"{name}: counted {counted}, seen {seen} to {seen + more}"
        for name, (counted, seen, more) in pairs.items()
        if not seen <= counted <= seen + more
    ]
    figure = f"pdray_requests: {_listed(outcomes)}, {total} in all; clients saw {sure}, and {unsure} left before that"
    limit = "counted = seen, up to those who left before an answer"
    return Row("storm, metrics", with_problems(figure, problems), limit, not problems)


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{number} {name}" for name, number in counts.most_common()) or "none"
