"""All pairs of a prefill and a decode worker send at once, for long, to clients of which many leave.

Nothing hangs, no pair falls silent while the others send, and in the end the answers are what one worker that does both
has said. On a GPU the channels are to be named one by one: `--channel nccl`, `cuda_ipc`, `object_store`.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter

from application import NAME, Application, replaced
from deaths import differences, with_problems
from rows import Row
from scale import Scale
from streams import MODEL, Answer, Body, Clients, new_session, story

from pdray.actors.client import describe
from pdray.testing.topology import Pair, connected, pairs, sent_bytes

SEED = 3
LOOK_S = 1.0
MAX_SILENCE_S = 60.0
REQUEST_TIMEOUT_S = 180.0  # a busy machine is slow; what hangs is seen by its pair's silence before
MAX_PROMPT_TOKENS = 400
MAX_TOKENS = 64


async def said_by_one(app: Application, scale: Scale) -> list[Answer]:
    """What the streams say that are asked for in the end."""
    bodies = [story(index, scale.num_tokens) for index in range(scale.num_streams)]
    async with new_session() as session:
        clients = Clients(app.url, session)
        return await asyncio.gather(*(clients.ask(body) for body in bodies))


async def mesh(app: Application, scale: Scale, expected: list[Answer]) -> list[Row]:
    """A row for the connections, one for the load, one for what is said after it."""
    config = app.config
    due = pairs(config.num_prefill_workers, config.num_decode_workers)
    state = await asyncio.to_thread(describe, NAME)
    kinds = Counter(kind for worker in state["workers"] for kind in worker.get("channels", {}).values())
    missing = [" → ".join(pair) for pair in sorted(due - connected(state))]
    figure = ", ".join(f"{number} of {kind}" for kind, number in kinds.items())
    problems = missing + (
        [] if config.channel in ("auto", *kinds) and len(kinds) == 1 else [f"asked: {config.channel}"]
    )
    rows = [Row(f"mesh: {len(due)} channels", with_problems(figure, problems), "each pair, of one kind", not problems)]
    async with new_session() as session:
        clients = Clients(app.url, session)
        rows.append(await _load(app, clients, due, scale))
        answers = await asyncio.gather(*(clients.ask(story(i, scale.num_tokens)) for i in range(scale.num_streams)))
    problems = differences(answers, expected) + await app.problems_at_rest()
    figure = f"{len(answers) - len(differences(answers, expected))} of {len(answers)} streams the same"
    rows.append(Row("mesh: afterwards", with_problems(figure, problems), "as colocated; nothing in use", not problems))
    return rows


async def _load(app: Application, clients: Clients, due: set[Pair], scale: Scale) -> Row:
    began, before = time.monotonic(), await app.pids()
    until = began + scale.mesh_s
    rng = random.Random(SEED)
    loads = [_client(clients, random.Random(rng.random()), until) for _ in range(scale.mesh_clients * len(due))]
    watching = asyncio.ensure_future(_watch(app, due, until))
    outcomes: Counter[str] = Counter()
    problems: list[str] = []
    for answer in (each for answers in await asyncio.gather(*loads) for each in answers):
        outcomes[answer.outcome] += 1
        if answer.outcome not in ("finished", "left", "refused"):
            problems.append(f"{answer.outcome}: {answer.error}")
    silence, sent = await watching
    problems += [f"{' → '.join(pair)} sent nothing for {s:.0f} s" for pair, s in silence.items() if s > MAX_SILENCE_S]
    problems += await app.problems_at_rest()
    problems += replaced(before, await app.pids())
    listed = ", ".join(f"{number} {name}" for name, number in outcomes.most_common())
    rates = sorted(sent.get(pair, 0) / (time.monotonic() - began) / 1e6 for pair in due)
    figure = (
        f"{scale.mesh_s:g} s: {listed}; {rates[0]:.1f} to {rates[-1]:.1f} MB/s of each pair, {sum(rates):.1f} in all"
    )
    figure += f"; the longest silence of one {max(silence.values()):.0f} s"
    limit = f"each ends well; no pair silent for {MAX_SILENCE_S:g} s; nobody replaced; integrity and nothing in use"
    return Row("mesh: all pairs at once, a third leaves", with_problems(figure, problems), limit, not problems)


async def _watch(app: Application, due: set[Pair], until: float) -> tuple[dict[Pair, float], dict[Pair, int]]:
    """The longest time for which each pair completed no put, and what each has sent."""
    silence = dict.fromkeys(due, 0.0)
    sent: dict[Pair, int] = dict.fromkeys(due, 0)
    heard = dict.fromkeys(due, time.monotonic())
    before = sent_bytes(await asyncio.to_thread(describe, NAME))
    while time.monotonic() < until:
        await asyncio.sleep(LOOK_S)
        total, now = sent_bytes(await asyncio.to_thread(describe, NAME)), time.monotonic()
        for pair in due:
            so_far = total.get(pair, 0) - before.get(pair, 0)
            if so_far != sent[pair]:
                sent[pair], heard[pair] = so_far, now
            silence[pair] = max(silence[pair], now - heard[pair])
    return silence, sent


async def _client(clients: Clients, rng: random.Random, until: float) -> list[Answer]:
    answers = []
    while time.monotonic() < until:
        leaves = rng.random() < 1 / 3
        answers.append(
            await clients.ask(
                _body(rng), timeout_s=REQUEST_TIMEOUT_S, leave_after_s=rng.uniform(0.0, 1.0) if leaves else None
            )
        )
    return answers


def _body(rng: random.Random) -> Body:
    """Of random tokens, so that nothing is cached and everything is sent."""
    return {
        "model": MODEL,
        "prompt": [rng.randrange(100, 40_000) for _ in range(rng.randint(1, MAX_PROMPT_TOKENS))],
        "max_tokens": rng.randint(1, MAX_TOKENS),
        "temperature": rng.choice([0.0, 1.0]),
        "seed": rng.randrange(1000),
        "n": rng.choice([1, 1, 1, 2]),
        "ignore_eos": True,
        "stream": True,
    }
