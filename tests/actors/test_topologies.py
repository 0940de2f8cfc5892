"""Several prefill and several decode workers on several nodes: fully connected, and as one worker that does both."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pdray import LLM
from pdray.outputs import RequestOutput
from pdray.testing.patience import PATIENCE_S
from pdray.testing.simulated_nodes import simulated_nodes
from pdray.testing.tiny_model import TINY_CONFIG
from pdray.testing.topology import (
    connected,
    in_use,
    node_ids,
    pairs,
    requests,
    sent_bytes,
    tokens,
    tokens_of_one_engine,
)

pytestmark = pytest.mark.ray

NUM_TOKENS = 300
PROMPTS, PARAMS = requests(24, range(94), NUM_TOKENS)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Of a model of random weights, in a cluster of two nodes with two CPUs each: four workers fill them."""
    path: Path = tmp_path_factory.mktemp("tiny") / "config.json"
    path.write_text(json.dumps(TINY_CONFIG))
    with simulated_nodes(2, 2):
        yield {
            "model": str(path),
            "load_format": "dummy",
            "skip_tokenizer_init": True,
            "device": "cpu",
            "num_kv_blocks": 24 * 2 * 26,
            "worker_num_cpus": 1,
            "restart_backoff_s": 0.1,
            "worker_timeout_s": 10.0,  # a loaded machine is no failure
        }


@pytest.fixture(scope="module")
def expected(settings: dict[str, Any]) -> list[list[list[int]]]:
    return tokens_of_one_engine(settings, PROMPTS, PARAMS)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.05)


def test_every_pair_is_connected_and_says_what_one_worker_says(
    settings: dict[str, Any], expected: list[list[list[int]]]
) -> None:
    """Other shapes: `make chaos ARGS="--rows topologies"`."""
    mesh = pairs(2, 2)
    with LLM(num_prefill_workers=2, num_decode_workers=2, **settings) as llm:
        assert connected(llm.status()) == mesh
        assert len(set(node_ids(llm).values())) == 2
        for _ in range(10):  # which pair a request gets depends on who is done first
            assert tokens(llm.generate(PROMPTS, PARAMS, use_tqdm=False)) == expected
            if sent_bytes(llm.status()).keys() == mesh:
                break
        assert sent_bytes(llm.status()).keys() == mesh
        wait_for(lambda: not in_use(llm.status()))
        kill_under_load(llm, "decode-1", mesh, expected)


def kill_under_load(llm: LLM, worker_id: str, mesh: set[tuple[str, str]], expected: list[list[list[int]]]) -> None:
    """Every stream goes on, and whoever takes the worker's place is connected to all."""

    def row(name: str) -> dict[str, Any]:
        return next(each for each in llm.status()["workers"] if each["worker_id"] == name)

    said: list[list[RequestOutput]] = []
    asking = threading.Thread(target=lambda: said.append(llm.generate(PROMPTS, PARAMS, use_tqdm=False)))
    asking.start()
    wait_for(lambda: row(worker_id).get("running", 0) > 0)
    victim = row(worker_id)["pid"]
    os.kill(victim, signal.SIGKILL)
    assert asking.is_alive()
    asking.join(PATIENCE_S)
    assert [tokens(outputs) for outputs in said] == [expected]
    wait_for(lambda: connected(llm.status()) == mesh and row(worker_id).get("pid", victim) != victim)
    wait_for(lambda: not in_use(llm.status()))
