"""Mixed load for a long time: what the processes hold at rest must not grow."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections import Counter
from typing import NamedTuple

import psutil
from application import Application, seconds_until
from deaths import BACK_TIMEOUT_S, with_problems
from rows import Row
from scale import Scale
from streams import MODEL, Answer, Clients, anything, new_session

SEED = 2
SAMPLE_INTERVAL_S = 10.0
LOAD_SHARE = 0.6  # of the interval; the rest is for the last requests to end
NUM_CLIENTS = 6
KILL_INTERVAL_S = 60.0
MAX_PROMPT_TOKENS = 100
MAX_TOKENS = 48
MAX_RSS_GROWTH = 0.05
MAX_RSS_GROWTH_MIB = 20.0
MAX_MORE = {"threads": 2, "files": 0, "sockets": 0}  # gRPC and Ray start a thread now and then, and end it


class Sample(NamedTuple):
    """What a process held at rest. files: descriptors of any kind; sockets: of IP."""

    rss_mib: float
    threads: int
    files: int
    sockets: int


async def soak(app: Application, scale: Scale) -> list[Row]:
    """A row for the requests, and one for each process."""
    rng = random.Random(SEED)
    until = time.monotonic() + 60.0 * scale.soak_minutes
    samples: dict[str, list[Sample]] = {}
    outcomes: Counter[str] = Counter()
    problems: list[str] = []
    num_kills, kill_at = 0, time.monotonic() + KILL_INTERVAL_S
    async with new_session() as session:
        clients = Clients(app.url, session)
        await _touch_every_block(app, clients, rng)
        while time.monotonic() < until:
            next_at = time.monotonic() + SAMPLE_INTERVAL_S
            load_until = time.monotonic() + LOAD_SHARE * SAMPLE_INTERVAL_S
            load = asyncio.gather(*(_client(clients, rng, load_until) for _ in range(NUM_CLIENTS)))
            if scale.soak_kills and time.monotonic() >= kill_at:
                gone = {await app.kill(rng.choice(sorted(await app.workers())))}
                num_kills, kill_at = num_kills + 1, time.monotonic() + KILL_INTERVAL_S
                await seconds_until(lambda gone=gone: app.whole(gone), time.monotonic(), BACK_TIMEOUT_S)
            for answer in (each for answers in await load for each in answers):
                outcomes[answer.outcome] += 1
                if answer.outcome not in ("finished", "left", "refused"):
                    problems.append(f"{answer.outcome}: {answer.error}")
            problems += await app.problems_at_rest()
            await asyncio.sleep(max(0.0, next_at - time.monotonic()))
            for name, sample in (await _samples(app)).items():
                samples.setdefault(name, []).append(sample)
    listed = ", ".join(f"{number} {name}" for name, number in outcomes.most_common())
    figure = f"{scale.soak_minutes:g} minutes, {num_kills} kills: {listed}"
    limit = "each ends well; integrity and nothing in use at every rest"
    rows = [Row("soak", with_problems(figure, problems), limit, not problems)]
    return rows + [_growth_row(name, series) for name, series in samples.items()]


async def _touch_every_block(app: Application, clients: Clients, rng: random.Random) -> None:
    """Memory of a pool is taken at its blocks' first use; this is that use, for every worker."""
    length = app.config.max_model_len or 512
    num_requests = (
        3 * app.config.num_decode_workers * (app.config.num_kv_blocks or 512) * app.config.block_size // length
    )
    for _ in range(0, num_requests, NUM_CLIENTS):
        prompts = ([rng.randrange(100, 40_000) for _ in range(length - 32)] for _ in range(NUM_CLIENTS))
        bodies = [{"model": MODEL, "prompt": prompt, "max_tokens": 16, "ignore_eos": True} for prompt in prompts]
        await asyncio.gather(*(clients.ask(body) for body in bodies))


async def _client(clients: Clients, rng: random.Random, until: float) -> list[Answer]:
    answers = []
    while time.monotonic() < until:
        body = anything(rng, MAX_PROMPT_TOKENS, MAX_TOKENS)
        leaves = rng.random() < 0.2
        answers.append(await clients.ask(body, leave_after_s=rng.uniform(0.0, 2.0) if leaves else None))
    return answers


async def _samples(app: Application) -> dict[str, Sample]:
    """One for each of pdray's processes; one that is just being replaced has none."""
    samples = {}
    for name, pid in (await app.pids()).items():
        try:
            process = psutil.Process(pid)
            samples[name] = Sample(
                rss_mib=process.memory_info().rss / 2**20,
                threads=process.num_threads(),
                files=process.num_fds(),
                sockets=len(process.net_connections(kind="inet")),
            )
        except psutil.NoSuchProcess:
            continue
    return samples


def _growth_row(name: str, series: list[Sample]) -> Row:
    """From the first third's medians to the last third's."""
    third = max(1, len(series) // 3)
    first, last = (
        Sample(*(statistics.median(values) for values in zip(*part, strict=True)))
        for part in (series[:third], series[-third:])
    )
    grown = [field for field, more in MAX_MORE.items() if getattr(last, field) > getattr(first, field) + more]
    if last.rss_mib > first.rss_mib * (1 + MAX_RSS_GROWTH) + MAX_RSS_GROWTH_MIB:
        grown.append("RSS")
    figure = f"RSS {first.rss_mib:.0f} → {last.rss_mib:.0f} MiB" + "".join(
        f", {field} {getattr(first, field):g} → {getattr(last, field):g}" for field in MAX_MORE
    )
    limit = f"RSS < {MAX_RSS_GROWTH:.0%} + {MAX_RSS_GROWTH_MIB:g} MiB more; <= 2 more threads, no more files, sockets"
    return Row(f"soak, {name}", f"{figure} ({len(series)} samples)", limit, not grown)
