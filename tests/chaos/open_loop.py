"""Four times the load that the real model can bear: served right, or refused with a time to come back."""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter

from application import Application
from deaths import differences, with_problems
from rows import Row
from scale import Scale
from streams import Answer, Body, Clients, new_session, story

OVERLOAD = 4
NUM_PROMPTS = 16
NUM_TOKENS = 16
NUM_CLIENTS_MORE = 4  # than places, so that the queue is never empty while capacity is measured
MEASURE_SHARE = 0.5


async def open_loop(app: Application, scale: Scale) -> list[Row]:
    """Measures capacity in a closed loop, then sends at four times that rate, whatever comes back."""
    bodies = [story(index, NUM_TOKENS) | {"stream": False, "stream_options": None} for index in range(NUM_PROMPTS)]
    num_places = app.config.num_decode_workers * app.config.max_num_seqs
    async with new_session() as session:
        clients = Clients(app.url, session)
        expected = [await clients.ask(body) for body in bodies]
        until = time.monotonic() + MEASURE_SHARE * scale.overload_s
        loops = (_closed_loop(clients, bodies, until) for _ in range(num_places + NUM_CLIENTS_MORE))
        capacity = sum(await asyncio.gather(*loops)) / (MEASURE_SHARE * scale.overload_s)
        began = time.monotonic()
        num_requests = math.ceil(OVERLOAD * capacity * scale.overload_s)
        tasks: list[asyncio.Task[Answer]] = []
        for number in range(num_requests):
            await asyncio.sleep(max(0.0, began + number / (OVERLOAD * capacity) - time.monotonic()))
            tasks.append(asyncio.ensure_future(clients.ask(bodies[number % NUM_PROMPTS])))
        answers = await asyncio.gather(*tasks)
    lasted = max(answer.finished_at for answer in answers) - began
    served = [(a, expected[number % NUM_PROMPTS]) for number, a in enumerate(answers) if a.outcome != "refused"]
    problems = differences([answer for answer, _ in served], [whole for _, whole in served])
    wrong = Counter((a.status, a.retry_after_s) for a in answers if a.outcome == "refused" and not _is_429(a))
    problems += [f"{number} refused with {status}, Retry-After {after}" for (status, after), number in wrong.items()]
    problems += await app.problems_at_rest()
    figure = (
        f"capacity {capacity:.1f} requests/s; {num_requests} sent at {OVERLOAD * capacity:.1f}/s: {len(served)} "
        f"served ({len(served) / lasted:.1f}/s), {len(answers) - len(served)} refused"
    )
    limit = "200 with the right text, or 429 with Retry-After; nothing in use"
    return [Row(f"{OVERLOAD}x overload, real model", with_problems(figure, problems), limit, not problems)]


async def _closed_loop(clients: Clients, bodies: list[Body], until: float) -> int:
    """Ask again and again. Returns how many were served in time."""
    num_served = 0
    while time.monotonic() < until:
        answer = await clients.ask(bodies[num_served % len(bodies)])
        num_served += answer.outcome == "finished" and answer.finished_at <= until
    return num_served


def _is_429(answer: Answer) -> bool:
    return answer.status == 429 and answer.retry_after_s is not None and answer.retry_after_s >= 1
