"""Parts that hang: each is stopped under streams, for good or until it wakes up too late.

Streams that do not pass through the sick part go on token for token, nobody healthy is killed, and the service is whole
again soon. A part that was ended before it could wake up is not waited for.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time

import psutil
import ray
from application import Application, has_title, processes, replaced, seconds_until
from deaths import BACK_TIMEOUT_S, differences, with_problems
from loops import loops_fail
from rows import Row
from scale import Scale
from streams import Answer, Body, Clients, new_session, story

WAKES_AFTER_S = (None, 10.0, 90.0)  # None: stopped for good
MAX_AWAY_S = 20.0
STOPS_S = 0.5  # after the signal it has stopped
CONTROLLER_TITLE = "ray::ServeController"
LIMIT = "streams the same; only the sick part replaced, and in 20 s; nothing in use"


async def hangs(app: Application, scale: Scale) -> list[Row]:
    """A row for exceptions in loops, and one for each part and each time after which it wakes up."""
    bodies = [story(index, scale.num_tokens) for index in range(scale.num_streams)]
    rows = []
    async with new_session() as session:
        clients = Clients(app.url, session)
        expected = await asyncio.gather(*(clients.ask(body) for body in bodies))
        midway = clients.num_pieces // 3
        rows.append(await loops_fail(app, clients, bodies, expected, midway))
        for name in await app.pids():
            for seconds in WAKES_AFTER_S if scale.every_wake else WAKES_AFTER_S[:1]:
                rows.append(await _hangs(app, clients, bodies, expected, midway, name, seconds))
        for seconds in WAKES_AFTER_S if scale.every_wake else WAKES_AFTER_S[1:2]:
            rows.append(await _controller_hangs(app, clients, bodies, expected, midway, seconds))
    return rows


async def _hangs(
    app: Application,
    clients: Clients,
    bodies: list[Body],
    expected: list[Answer],
    midway: int,
    name: str,
    wakes_after_s: float | None,
) -> Row:
    before = await app.pids()
    tasks = [asyncio.ensure_future(clients.ask(body, timeout_s=60.0)) for body in bodies]
    await clients.pieces(midway)
    since = time.monotonic()
    victim = before[name]
    os.kill(victim, signal.SIGSTOP)
    waking = asyncio.ensure_future(_wake(victim, wakes_after_s))
    streams = asyncio.gather(*tasks)
    await asyncio.sleep(STOPS_S)
    ended = await seconds_until(lambda: _has_ended_or_woken(victim), since, BACK_TIMEOUT_S)
    back = await seconds_until(lambda: app.whole(set() if _runs(victim) else {victim}), since, BACK_TIMEOUT_S)
    answers = await streams
    waking.cancel()
    again = [] if name != "replica" else [await clients.ask(bodies[0], timeout_s=60.0)]
    problems = differences(answers, expected) if name != "replica" else _broken_well(answers, expected)
    problems += differences(again, expected)
    problems += replaced(before, await app.pids(), {name})
    problems += [f"whole only after {back:.1f} s"] if back > MAX_AWAY_S + app.load_s else []
    problems += await app.problems_at_rest()
    last = max(answer.finished_at for answer in answers) - since
    end = "went on" if _runs(victim) else "was ended"
    figure = f"{end} after {ended:.1f} s; last stream ended after {last:.1f} s; whole after {back:.1f} s"
    return Row(f"{name} hangs, {_wakes(wakes_after_s)}", with_problems(figure, problems), LIMIT, not problems)


async def _controller_hangs(
    app: Application,
    clients: Clients,
    bodies: list[Body],
    expected: list[Answer],
    midway: int,
    wakes_after_s: float | None,
) -> Row:
    """Serve's controller stops, and a worker dies while it does not answer: it is replaced all the same."""
    before = await app.pids()
    controller = next(process.pid for process in processes() if has_title(process, CONTROLLER_TITLE))
    tasks = [asyncio.ensure_future(clients.ask(body)) for body in bodies]
    await clients.pieces(midway)
    since = time.monotonic()
    os.kill(controller, signal.SIGSTOP)
    try:
        dead = await app.kill("decode-0")
        back, *answers = await asyncio.gather(seconds_until(lambda: app.whole({dead}), since, BACK_TIMEOUT_S), *tasks)
        await asyncio.sleep(max(0.0, since + (wakes_after_s or 0.0) - time.monotonic()))
    finally:
        os.kill(controller, signal.SIGKILL if wakes_after_s is None else signal.SIGCONT)
    await seconds_until(_serve_answers, time.monotonic(), BACK_TIMEOUT_S)
    problems = differences(answers, expected) + replaced(before, await app.pids(), {"decode-0"})
    problems += [f"the dead worker was back only after {back:.1f} s"] if back > MAX_AWAY_S + app.load_s else []
    problems += await app.problems_at_rest()
    last = max(answer.finished_at for answer in answers) - since
    figure = f"decode-0 killed meanwhile: last stream ended after {last:.1f} s, back after {back:.1f} s"
    limit = "streams the same; the dead worker back in 20 s; nobody else replaced; nothing in use"
    name = f"Serve's controller hangs, {_wakes(wakes_after_s)}"
    return Row(name, with_problems(figure, problems), limit, not problems)


async def _wake(pid: int, after_s: float | None) -> None:
    if after_s is not None:
        await asyncio.sleep(after_s)
        if _runs(pid):
            os.kill(pid, signal.SIGCONT)


async def _has_ended_or_woken(pid: int) -> bool:
    return not _runs(pid) or psutil.Process(pid).status() != psutil.STATUS_STOPPED


async def _serve_answers() -> bool:
    from ray import serve

    try:
        return bool(await asyncio.wait_for(asyncio.to_thread(lambda: serve.status().applications), 5.0))
    except (TimeoutError, ray.exceptions.RayError):
        return False


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _broken_well(answers: list[Answer], expected: list[Answer]) -> list[str]:
    """The streams of a router replica that hangs break: none hangs, and none has said anything wrong."""
    problems = []
    for index, (answer, whole) in enumerate(zip(answers, expected, strict=True)):
        if answer.outcome == "hung":
            problems.append(f"stream {index} hung")
        elif not whole.texts[0].startswith(answer.texts.get(0, "")):
            problems.append(f"stream {index} said something else before it broke")
    return problems


def _wakes(after_s: float | None) -> str:
    return "for good" if after_s is None else f"wakes up after {after_s:g} s"
