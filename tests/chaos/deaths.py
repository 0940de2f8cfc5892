"""Processes that die or stop under streams: every stream still says what it says undisturbed."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable

from application import Application, seconds_until
from rows import Row
from scale import Scale
from streams import Answer, Body, Clients, new_session, story

from pdray.config import Config
from pdray.gpu_settings import num_ranks

BACK_TIMEOUT_S = 120.0

Stories = list[Answer]
Disturbance = Callable[[Application], Awaitable[set[int]]]


def kill(name: str, signal_number: signal.Signals = signal.SIGKILL) -> Disturbance:
    """Sends one process a signal. Returns, when awaited, the pids that must be gone in the end."""

    async def disturb(app: Application) -> set[int]:
        return {await app.kill(name, signal_number)}

    return disturb


def kill_two(role: str) -> Disturbance:
    """The first of a role's workers, and the second while another first is starting."""

    async def disturb(app: Application) -> set[int]:
        first = await app.kill(f"{role}-0")

        async def is_starting() -> bool:
            return (await app.workers())[f"{role}-0"]["state"] == "starting"

        await seconds_until(is_starting, 0.0, 30.0)
        return {first, await app.kill(f"{role}-1")}

    return disturb


def kill_rank(name: str) -> Disturbance:
    """The last of the processes that share a worker's model, which ends with it."""

    async def disturb(app: Application) -> set[int]:
        worker = (await app.workers())[name]
        rank: int = worker["ranks"][-1]["pid"]
        os.kill(rank, signal.SIGKILL)
        return {rank, worker["pid"]}

    return disturb


def disturbances(config: Config) -> dict[str, Disturbance]:
    """By the name of their rows: those that the number of workers allows."""
    num_prefill_workers = 0 if config.mode == "colocated" else config.num_prefill_workers
    found = {"decode worker killed": kill("decode-0")}
    if num_prefill_workers:
        found["prefill worker killed"] = kill("prefill-0")
    found["Coordinator killed"] = kill("coordinator")
    found["decode worker stopped"] = kill("decode-0", signal.SIGSTOP)
    for role, number in (("decode", config.num_decode_workers), ("prefill", num_prefill_workers)):
        if number > 1:
            both = "both" if number == 2 else f"two of {number}"
            found[f"{both} {role} workers killed, one after the other"] = kill_two(role)
        if number and num_ranks(config, role) > 1:
            found[f"rank of a {role} worker killed"] = kill_rank(f"{role}-0")
    return found


async def deaths(app: Application, scale: Scale) -> list[Row]:
    """A row for each disturbance of all streams midway, and one for the death of the router replica."""
    bodies = [story(index, scale.num_tokens) for index in range(scale.num_streams)]
    async with new_session() as session:
        clients = Clients(app.url, session)
        expected = await asyncio.gather(*(clients.ask(body) for body in bodies))
        told = [answer.error or answer.outcome for answer in expected if answer.outcome != "finished"]
        if told or any(answer.num_tokens != scale.num_tokens for answer in expected):
            return [Row("streams undisturbed", f"{len(told)} did not finish: {told[:1]}", "all finish", False)]
        midway = clients.num_pieces // 3  # not tokens: a fast worker's come several at once
        rows = [
            await _disturbed(app, clients, bodies, expected, midway, *item) for item in disturbances(app.config).items()
        ]
        rows.append(await _replica_killed(app, clients, bodies, expected, midway))
    return rows


async def _disturbed(
    app: Application,
    clients: Clients,
    bodies: list[Body],
    expected: Stories,
    midway: int,
    name: str,
    disturb: Disturbance,
) -> Row:
    tasks = [asyncio.ensure_future(clients.ask(body)) for body in bodies]
    await clients.pieces(midway)
    since = time.monotonic()
    running = sum(not task.done() for task in tasks)
    gone = await disturb(app)
    back, *answers = await asyncio.gather(seconds_until(lambda: app.whole(gone), since, BACK_TIMEOUT_S), *tasks)
    last = max(answer.finished_at for answer in answers) - since
    problems = differences(answers, expected) + await app.problems_at_rest()
    figure = f"{running} of {len(tasks)} running; last ended after {last:.1f} s; all back after {back:.1f} s"
    return Row(
        name, with_problems(figure, problems), "all end, same text and count of tokens; nothing in use", not problems
    )


async def _replica_killed(
    app: Application, clients: Clients, bodies: list[Body], expected: Stories, midway: int
) -> Row:
    tasks = [asyncio.ensure_future(clients.ask(body, timeout_s=60.0)) for body in bodies]
    await clients.pieces(midway)
    since = time.monotonic()
    gone = {await app.kill("replica")}
    back, *answers = await asyncio.gather(seconds_until(lambda: app.whole(gone), since, BACK_TIMEOUT_S), *tasks)
    last = max(answer.finished_at for answer in answers) - since
    again = await clients.ask(bodies[0])
    problems = differences([again], expected) + await app.problems_at_rest()
    for index, (answer, whole) in enumerate(zip(answers, expected, strict=True)):
        if answer.outcome == "hung":
            problems.append(f"stream {index} hung")
        elif answer.ended and not answer.error and answer.content != whole.content:
            problems.append(f"stream {index} ended with another text")
        elif not whole.texts[0].startswith(answer.texts.get(0, "")):
            problems.append(f"stream {index} said something else before it broke")
    broken = sum(answer.outcome != "finished" for answer in answers)
    figure = f"{broken} of {len(tasks)} broke, within {last:.1f} s; all back after {back:.1f} s"
    return Row(
        "router replica killed",
        with_problems(figure, problems),
        "none hangs; service is back; nothing in use",
        not problems,
    )


def differences(answers: list[Answer], expected: Stories) -> list[str]:
    """Which answers did not finish, or differ from the ones expected in text or number of tokens."""
    problems = []
    for index, (answer, whole) in enumerate(zip(answers, expected, strict=False)):
        if answer.outcome != "finished":
            problems.append(f"stream {index} {answer.outcome}: {answer.error}")
        elif answer.content != whole.content:
            problems.append(f"stream {index} differs: {_where(answer, whole)}")
    return problems


def _where(answer: Answer, whole: Answer) -> str:
    """The first difference between two answers."""
    for index in sorted(whole.texts):
        said, should = answer.texts.get(index, ""), whole.texts[index]
        if said != should:
            same = len(os.path.commonprefix([said, should]))
            return f"choice {index} at {same}: {said[same : same + 40]!r} for {should[same : same + 40]!r}"
    return f"{answer.num_tokens} tokens for {whole.num_tokens}, {len(answer.texts)} choices for {len(whole.texts)}"


def with_problems(figure: str, problems: list[str]) -> str:
    """The figure, and the first of what is wrong."""
    more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
    return figure + "".join(f"; {problem}" for problem in problems[:3]) + more
