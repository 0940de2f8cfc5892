"""Loads of prompts and decodes together on one engine, and what each side got."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from itertools import count
from typing import NamedTuple

import numpy as np

from pdray.bench.rows import VOCABULARY_START
from pdray.engine.engine import Engine
from pdray.engine.request import EngineRequest, RequestUpdate
from pdray.sampling_params import SamplingParams

QUEUED_PROMPTS = 3  # of an endless supply
WARM_UP = 0.3  # of the measured time, before it
MIN_STEPS = 30  # that are counted, however short the time


class Beside(NamedTuple):
    """Attributes:
    gap_p50, gap_p99, gap_max: ms between two tokens of a sequence. prompt_rate: tokens of prompts a second.
    """

    gap_p50: float | None
    gap_p99: float | None
    gap_max: float | None
    prompt_rate: float


class Served(NamedTuple):
    """One request. tpot_s: mean after the first token. longest_gap_s: between two tokens."""

    ttft_s: float
    tpot_s: float
    longest_gap_s: float


class Prompts:
    """Random prompts, no two alike. keys: of their requests, none twice."""

    def __init__(self, vocab_size: int, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._low, self._high = min(VOCABULARY_START, vocab_size // 2), vocab_size
        self._keys = count()

    def request(self, input_len: int, output_len: int) -> EngineRequest:
        key = next(self._keys)
        params = SamplingParams(temperature=0.6, seed=key, max_tokens=output_len, ignore_eos=True)
        return EngineRequest(key, self._rng.integers(self._low, self._high, size=input_len).tolist(), params)


def measure_beside(
    engine: Engine, prompts: Prompts, *, num_decodes: int, context: int, input_len: int, seconds: float
) -> Beside:
    """Sequences that decode beside prompts that never end.

    Args:
        num_decodes: sequences; 0: prompts alone. context: tokens of each when it begins to decode.
        input_len: of each prompt; 0: decodes alone.
    """
    most = engine.max_model_len - context
    decoding = [request.key for request in _add(engine, prompts, num_decodes, context, most)]
    first = decoding[0] if decoding else None
    started: set[object] = set()
    while len(started) < len(decoding):  # their own prompts
        started |= {update.key for update in engine.step() if update.tokens}
    queued = {request.key for request in _add(engine, prompts, QUEUED_PROMPTS if input_len else 0, input_len, 1)}
    began = time.perf_counter()
    until, counted_from = began + (1 + WARM_UP) * seconds, began + WARM_UP * seconds
    gaps: list[float] = []
    last, num_prompt_tokens, now, num_counted = None, None, began, 0
    while now < until or num_counted < MIN_STEPS:
        updates = engine.step()
        now = time.perf_counter()
        ended = {update.key for update in updates if update.finished} & queued
        queued -= ended
        queued |= {request.key for request in _add(engine, prompts, len(ended), input_len, 1)}
        if now < counted_from:
            continue
        if num_prompt_tokens is None:
            num_prompt_tokens, counted_at = engine.stats().num_prompt_tokens, now
        num_counted += 1
        if any(update.key == first and update.tokens for update in updates):
            if last is not None:
                gaps.append((now - last) * 1000)
            last = now
    rate = (engine.stats().num_prompt_tokens - (num_prompt_tokens or 0)) / (now - counted_at)
    clear(engine)
    if not gaps:
        return Beside(None, None, None, rate)
    p50, p99, longest = (round(float(x), 2) for x in np.percentile(gaps, (50, 99, 100)))
    return Beside(p50, p99, longest, rate)


def _add(engine: Engine, prompts: Prompts, number: int, input_len: int, output_len: int) -> list[EngineRequest]:
    added = [prompts.request(input_len, output_len) for _ in range(number)]
    for request in added:
        engine.add(request)
    return added


def clear(engine: Engine) -> None:
    """End every request, and what is in flight."""
    for key in engine.live_keys():
        engine.release(key)
    while engine.has_work():
        engine.step()


def serve(engine: Engine, requests: Iterator[tuple[float, EngineRequest]]) -> list[Served]:
    """Requests at their times, in seconds from now; to the end."""
    waiting = deque(requests)
    times: dict[object, list[float]] = {}
    done: list[Served] = []
    began = time.perf_counter()
    while waiting or times:
        now = time.perf_counter() - began
        while waiting and waiting[0][0] <= now:
            at, request = waiting.popleft()
            times[request.key] = [at]
            engine.add(request)
        if not engine.has_work():
            time.sleep(min(1e-4, max(0.0, waiting[0][0] - now)) if waiting else 0.0)
            continue
        updates = engine.step()
        _note(updates, times, done, time.perf_counter() - began)
    return done


def _note(updates: list[RequestUpdate], times: dict[object, list[float]], done: list[Served], now: float) -> None:
    for update in updates:
        if update.tokens:
            times[update.key].append(now)
        if update.finished:
            arrived, *tokens = times.pop(update.key)
            done.append(served_of(arrived, tokens))


def served_of(arrived: float, tokens: list[float]) -> Served:
    """A request by the times of its arrival and of its tokens, of which there are two or more."""
    gaps = np.diff(tokens)
    return Served(tokens[0] - arrived, float(gaps.mean()), float(gaps.max()))


def goodput(served: list[Served], within: Callable[[Served], bool]) -> float:
    """Share of the requests that kept their limits."""
    return sum(map(within, served)) / len(served)
