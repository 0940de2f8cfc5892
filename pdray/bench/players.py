"""Send requests to an engine or a router at given times, and note when their tokens come."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import TYPE_CHECKING

from pdray.bench.rows import Requests
from pdray.engine.request import EngineRequest
from pdray.sampling_params import SamplingParams

if TYPE_CHECKING:
    from pdray.engine.engine import Engine
    from pdray.router.router import Router


def play_engine(engine: Engine, requests: Requests, arrivals: list[float]) -> list[list[float]]:
    """See pdray.bench.mixed.Play. Steps the engine by this thread."""
    times: list[list[float]] = [[] for _ in arrivals]
    coming = deque(enumerate(zip(arrivals, requests.prompts, requests.params, strict=True)))
    num_finished, began = 0, time.perf_counter()
    while num_finished < len(arrivals):
        while coming and coming[0][1][0] <= time.perf_counter() - began:
            key, (_, prompt, params) = coming.popleft()
            engine.add(EngineRequest(key=key, prompt_token_ids=prompt, params=params))
        if not engine.has_work():
            time.sleep(max(0.0, began + coming[0][1][0] - time.perf_counter()))
            continue
        updates = engine.step()
        now = time.perf_counter() - began
        for update in updates:
            assert isinstance(update.key, int)
            times[update.key] += [now] * len(update.tokens)
            num_finished += update.finished
    for key in range(len(arrivals)):
        engine.release(key)
    return times


async def play_router(router: Router, requests: Requests, arrivals: list[float]) -> list[list[float]]:
    """See pdray.bench.mixed.Play. On the router's event loop."""
    began = time.perf_counter()

    async def play_one(number: int, arrival: float, prompt: list[int], params: SamplingParams) -> list[float]:
        await asyncio.sleep(began + arrival - time.perf_counter())
        request = await router.submit(prompt, params, request_id=f"mixed-{began}-{number}")
        times: list[float] = []
        async for deltas in request:
            now = time.perf_counter() - began
            times += [now] * sum(len(delta.token_ids) for delta in deltas)
        return times

    each = zip(range(len(arrivals)), arrivals, requests.prompts, requests.params, strict=True)
    return list(await asyncio.gather(*(play_one(*one) for one in each)))
