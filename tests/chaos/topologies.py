"""Shapes of several prefill and decode workers over simulated nodes, on CPU: as colocated, also through a kill."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

from deaths import with_problems
from rows import Row
from scale import Scale

from pdray import LLM
from pdray.gpu_settings import as_colocated
from pdray.outputs import RequestOutput
from pdray.testing.simulated_nodes import simulated_nodes
from pdray.testing.topology import Pair, connected, in_use, node_ids, pairs, requests, sent_bytes, tokens

SHAPES = ((2, 2), (3, 1), (1, 3))
NUM_NODES = 4  # with room for one worker each
TIMEOUT_S = 300.0
SETTINGS: dict[str, Any] = {
    "device": "cpu",
    "max_model_len": 512,
    "num_kv_blocks": 600,
    "worker_num_cpus": 1,
    "restart_backoff_s": 0.5,
    "worker_timeout_s": 10.0,
}


def topologies(given: dict[str, Any], scale: Scale) -> list[Row]:
    """A row for each shape."""
    prompts, params = requests(scale.num_streams, range(100, 40_000), scale.num_tokens)
    settings = SETTINGS | given
    with simulated_nodes(NUM_NODES, 1):
        with LLM(**as_colocated(settings)) as llm:
            expected = tokens(llm.generate(prompts, params, use_tqdm=False))
        rows = []
        for num_prefill, num_decode in SHAPES:
            with LLM(num_prefill_workers=num_prefill, num_decode_workers=num_decode, **settings) as llm:
                ask = lambda llm=llm: llm.generate(prompts, params, use_tqdm=False)  # noqa: E731
                rows.append(_row(f"{num_prefill}P{num_decode}D", llm, ask, expected, pairs(num_prefill, num_decode)))
    return rows


def _row(
    name: str, llm: LLM, ask: Callable[[], list[RequestOutput]], expected: list[list[list[int]]], mesh: set[Pair]
) -> Row:
    problems = [f"not connected: {pair}" for pair in sorted(mesh - connected(llm.status()))]
    num_nodes = len(set(node_ids(llm).values()))
    problems += _different(ask(), expected)
    said: list[list[RequestOutput]] = []
    asking = threading.Thread(target=lambda: said.append(ask()), daemon=True)
    asking.start()
    _wait(lambda: _row_of(llm, "decode-0").get("running", 0) > 0)
    victim = _row_of(llm, "decode-0")["pid"]
    os.kill(victim, signal.SIGKILL)
    since = time.monotonic()
    problems += [] if asking.is_alive() else ["nothing ran any more at the kill"]
    asking.join(TIMEOUT_S)
    last = time.monotonic() - since
    problems += _different(said[0], expected) if said else ["the streams did not end"]
    _wait(lambda: connected(llm.status()) == mesh and _row_of(llm, "decode-0").get("pid", victim) != victim)
    _wait(lambda: not in_use(llm.status()))
    used = sent_bytes(llm.status())
    figure = f"{len(mesh)} pairs over {num_nodes} nodes, {len(used)} of them used; decode-0 killed under "
    figure += f"{len(expected)} streams, the last ended {last:.1f} s later"
    limit = "every pair connected, also afterwards; tokens as colocated, also through the kill; nothing in use"
    return Row(f"{name} over nodes", with_problems(figure, problems), limit, not problems)


def _different(outputs: list[RequestOutput], expected: list[list[list[int]]]) -> list[str]:
    differing = sum(one != other for one, other in zip(tokens(outputs), expected, strict=True))
    return [f"{differing} of {len(expected)} answers differ"] if differing else []


def _row_of(llm: LLM, worker_id: str) -> dict[str, Any]:
    return next(row for row in llm.status()["workers"] if row["worker_id"] == worker_id)


def _wait(condition: Callable[[], bool]) -> None:
    """Raises:
    TimeoutError: it does not hold within TIMEOUT_S.
    """
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"a condition did not hold within {TIMEOUT_S:g} s")
        time.sleep(0.1)
