"""The configuration changes under streams: beside the old one, in its place, and there with too short a grace."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field, replace

from application import NAME, Application, seconds_until
from deaths import differences, with_problems
from ray import serve
from rows import Row
from scale import Scale
from streams import Answer, Clients, new_session, story

from pdray.config import Config
from pdray.serve import build

PLACE = "place"  # each worker takes one, and the cluster has as many as workers where there is to be no room
PROBE_INTERVAL_S = 0.2
BACK_TIMEOUT_S = 180.0
LONGER = 4  # times as many tokens, so that streams outlast the start of the new configuration


@dataclass(slots=True)
class Probe:
    """Asks for one token again and again: when was there nobody to answer?"""

    clients: Clients
    outcomes: list[tuple[float, Answer]] = field(default_factory=list)

    async def run(self) -> None:
        body = story(0, 1)
        while True:
            self.outcomes.append((time.monotonic(), await self.clients.ask(body, timeout_s=60.0)))
            await asyncio.sleep(PROBE_INTERVAL_S)

    def away_s(self) -> float:
        """The longest time from a refusal to the next answer."""
        longest, since = 0.0, None
        for asked_at, answer in self.outcomes:
            if answer.outcome == "finished":
                longest, since = max(longest, answer.finished_at - since if since is not None else 0.0), None
            elif since is None:
                since = asked_at
        return longest

    def problems(self) -> list[str]:
        """Answers that are neither whole nor refusals with a reason."""
        wrong = [answer for _, answer in self.outcomes if answer.outcome not in ("finished", "refused")]
        return [f"a probe was {answer.outcome}: {answer.error}" for answer in wrong]

    def reasons(self) -> set[str]:
        return {answer.error for _, answer in self.outcomes if answer.outcome == "refused"}


async def beside(app: Application, scale: Scale) -> list[Row]:
    """There is room for both: nobody notices."""
    return [await _redeployed(app, scale, "redeployed where there is room", may_be_cut=False, may_be_away=False)]


async def in_place(app: Application, scale: Scale) -> list[Row]:
    """No room: the old one's streams end, and then the new one starts."""
    return [await _redeployed(app, scale, "redeployed where there is none", may_be_cut=False, may_be_away=True)]


async def cut_short(app: Application, scale: Scale) -> list[Row]:
    """As in_place(), with a grace that streams outlast: they are told."""
    name = f"redeployed, with a grace of {app.config.graceful_shutdown_timeout_s:g} s"
    scale = replace(scale, num_tokens=LONGER * scale.num_tokens)
    return [await _redeployed(app, scale, name, may_be_cut=True, may_be_away=True)]


async def _redeployed(app: Application, scale: Scale, name: str, *, may_be_cut: bool, may_be_away: bool) -> Row:
    bodies = [story(index, scale.num_tokens) for index in range(scale.num_streams)]
    async with new_session() as session:
        clients, probe = Clients(app.url, session), Probe(Clients(app.url, session))
        expected = await asyncio.gather(*(clients.ask(body) for body in bodies))
        midway = clients.num_pieces // 3
        before = {row["pid"] for row in (await app.workers()).values()}
        tasks = [asyncio.ensure_future(clients.ask(body)) for body in bodies]
        await clients.pieces(midway)
        since = time.monotonic()
        running = sum(not task.done() for task in tasks)
        probing = asyncio.ensure_future(probe.run())
        changed = Config(**app.config.model_dump() | {"max_queue_wait_s": app.config.max_queue_wait_s + 1})
        deploying = asyncio.to_thread(serve.run, build(changed), name=NAME, route_prefix="/")
        _, *answers = await asyncio.gather(deploying, *tasks)
        deployed = time.monotonic() - since

        async def only_new() -> bool:
            return await app.whole(before)

        back = await seconds_until(only_new, since, BACK_TIMEOUT_S)
        await asyncio.sleep(2.0)
        probing.cancel()
        again = await clients.ask(bodies[0])
    cut = [answer for answer in answers if answer.outcome == "failed"]
    whole = [(a, e) for a, e in zip(answers, expected, strict=True) if not (may_be_cut and a.outcome == "failed")]
    problems = differences([a for a, _ in whole], [e for _, e in whole]) + differences([again], expected)
    problems += probe.problems() + await app.problems_at_rest()
    if may_be_cut and not cut:
        problems.append("no stream outlasted the grace")
    if not may_be_away and probe.away_s():
        problems.append(f"refused: {sorted(probe.reasons())}")
    last = max(answer.finished_at for answer in answers) - since
    figure = (
        f"{running} of {len(tasks)} running; last ended after {last:.1f} s, {len(cut)} told that they were cut; "
        f"without service for {probe.away_s():.1f} s; deployed after {deployed:.1f} s; all new after {back:.1f} s"
    )
    limit = "none broken, same text and count of tokens; nothing in use" + (
        "" if may_be_away else "; always somebody to answer"
    )
    return Row(name, with_problems(figure, problems), limit, not problems)
