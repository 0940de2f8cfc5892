"""One request on which engines fail, under streams: it alone pays, and costs a worker or two at most."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from application import Application, seconds_until
from deaths import BACK_TIMEOUT_S, Stories, differences, with_problems
from rows import Row
from scale import Scale
from streams import MODEL, Answer, Body, Clients, new_session, story

FAULTS = Path(__file__).with_name("faults")
LOOK_INTERVAL_S = 0.2
MOST_DEATHS = 2  # in the first step that fails, and in the one that it has for itself


class Poison(NamedTuple):
    """mark: token id by which sitecustomize.py knows it. ends: whether the worker cannot survive it on CPU."""

    mark: int
    stream: bool
    ends: bool


POISONS = {
    "a prompt raises": Poison(48_101, False, False),
    "decoding raises": Poison(48_102, True, False),
    "a prompt breaks its worker": Poison(48_103, False, True),
    "decoding breaks its worker": Poison(48_104, True, True),
}


@contextmanager
def faults() -> Iterator[None]:
    """Processes that are started in the block, and theirs, load sitecustomize.py."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(FAULTS), *([before] if before else [])])
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


async def poison(app: Application, scale: Scale) -> list[Row]:
    """A row for each kind of poison, sent when all streams are midway."""
    bodies = [story(index, scale.num_tokens) for index in range(scale.num_streams)]
    async with new_session() as session:
        clients = Clients(app.url, session)
        expected = await asyncio.gather(*(clients.ask(body) for body in bodies))
        midway = clients.num_pieces // 3
        return [await _poisoned(app, clients, bodies, expected, midway, *item) for item in POISONS.items()]


async def _poisoned(
    app: Application, clients: Clients, bodies: list[Body], expected: Stories, midway: int, name: str, kind: Poison
) -> Row:
    seen: dict[str, set[int]] = {}
    looking = asyncio.ensure_future(_keep_looking(app, seen))
    tasks = [asyncio.ensure_future(clients.ask(body)) for body in bodies]
    await clients.pieces(midway)
    since = time.monotonic()
    body = {"model": MODEL, "prompt": [kind.mark, 500, 501], "max_tokens": 20, "n": 2, "seed": 1, "ignore_eos": True}
    answer = await clients.ask(body | {"stream": kind.stream})
    told = answer.finished_at - since
    answers = await asyncio.gather(*tasks)
    last = max(each.finished_at for each in answers) - since
    await seconds_until(lambda: app.whole(set()), since, BACK_TIMEOUT_S)
    problems = differences(answers, expected) + _wrongly_told(answer, kind) + await app.problems_at_rest()
    looking.cancel()
    await asyncio.gather(looking, return_exceptions=True)
    num_deaths = sum(len(pids) - 1 for pids in seen.values())
    most = MOST_DEATHS if kind.ends or app.config.device != "cpu" else 0
    if num_deaths > most:
        problems.append(f"{num_deaths} workers died")
    figure = f"told after {told:.1f} s, {num_deaths} workers died; last of {len(tasks)} streams after {last:.1f} s"
    limit = f"it alone fails, and says so; at most {most} deaths; nothing in use"
    return Row(f"poison: {name}", with_problems(figure, problems), limit, not problems)


def _wrongly_told(answer: Answer, kind: Poison) -> list[str]:
    """Whether the poisonous request failed, and with the right words."""
    status = 200 if kind.stream else 500
    if answer.outcome != "failed" or answer.status != status or "and no other" not in answer.error:
        return [f"it {answer.outcome}, {answer.status}: {answer.error}"]
    return []


async def _keep_looking(app: Application, seen: dict[str, set[int]]) -> None:
    """Every process that each worker's name has had; one takes seconds to start, so none is missed."""
    while True:
        for name, row in (await app.workers()).items():
            if "pid" in row:
                seen.setdefault(name, set()).add(row["pid"])
        await asyncio.sleep(LOOK_INTERVAL_S)
