"""The only decode worker dies: its streams wait for the next one and go on, and new requests are told what is up."""

from __future__ import annotations

import asyncio
import time

from application import Application, seconds_until
from deaths import BACK_TIMEOUT_S, differences, with_problems
from rows import Row
from scale import Scale
from streams import Answer, Clients, new_session, story

ASK_INTERVAL_S = 0.25
NUM_ASKED_TOKENS = 4


async def only_decode(app: Application, scale: Scale) -> list[Row]:
    """SIGKILL under streams of half the usual number; requests are sent until /health is 200 again."""
    bodies = [story(index, scale.num_tokens) for index in range(scale.num_streams // 2)]
    short = story(0, NUM_ASKED_TOKENS)
    async with new_session() as session:
        clients = Clients(app.url, session)
        expected = await asyncio.gather(*(clients.ask(body) for body in bodies))
        midway = clients.num_pieces // 3
        expected_short = await clients.ask(short)
        tasks = [asyncio.ensure_future(clients.ask(body)) for body in bodies]
        await clients.pieces(midway)
        since = time.monotonic()
        gone = {await app.kill("decode-0")}
        await seconds_until(lambda: _not(app), since, 10.0)
        asked: list[asyncio.Task[Answer]] = []
        asking = asyncio.ensure_future(_keep_asking(clients, short, asked))
        healthy = await seconds_until(app.healthy, since, BACK_TIMEOUT_S)
        asking.cancel()
        meanwhile = await asyncio.gather(*asked)
        answers = await asyncio.gather(*tasks)
    await seconds_until(lambda: app.whole(gone), since, BACK_TIMEOUT_S)
    problems = differences(answers, expected)
    problems += differences([a for a in meanwhile if a.outcome != "refused"], [expected_short] * len(meanwhile))
    refused = [a for a in meanwhile if a.outcome == "refused"]
    if wrong := [a for a in refused if a.status != 503 or not a.retry_after_s]:
        problems.append(f"{len(wrong)} refused with {wrong[0].status}, Retry-After {wrong[0].retry_after_s}")
    problems += await app.problems_at_rest()
    figure = (
        f"next token {_resumed(answers, since):.1f} s and /health 200 {healthy:.1f} s after the kill; of "
        f"{len(meanwhile)} requests meanwhile {len(refused)} got 503, {len(meanwhile) - len(refused)} were served"
    )
    limit = "same texts; requests meanwhile get 503 with Retry-After, or their text; nothing in use"
    return [Row("only decode worker killed", with_problems(figure, problems), limit, not problems)]


async def _not(app: Application) -> bool:
    return not await app.healthy()


async def _keep_asking(clients: Clients, body: dict[str, object], asked: list[asyncio.Task[Answer]]) -> None:
    while True:
        asked.append(asyncio.ensure_future(clients.ask(body)))
        await asyncio.sleep(ASK_INTERVAL_S)


def _resumed(answers: list[Answer], since: float) -> float:
    """Seconds until the first piece of any stream after its longest pause."""
    ends = []
    for answer in answers:
        pauses = [(after - before, after) for before, after in zip(answer.arrivals, answer.arrivals[1:], strict=False)]
        ends.append(max(pauses, default=(0.0, since))[1])
    return min(ends) - since
