"""Two workers on one device under Ray: one pool, one copy of the weights, and streams that outlive both."""

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
from pdray.sampling_params import SamplingParams
from pdray.testing.patience import PATIENCE_S
from pdray.testing.tiny_model import TINY_CONFIG
from pdray.testing.topology import in_use, requests, tokens, tokens_of_one_engine

pytestmark = pytest.mark.ray

NUM_TOKENS = 140
PROMPTS, PARAMS = requests(24, range(94), NUM_TOKENS)
ONE_TOKEN = SamplingParams(temperature=1, seed=4, n=2, max_tokens=1, ignore_eos=True)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of a model of random weights. Prompts go in chunks, and there are too few blocks for all to end at once."""
    path: Path = tmp_path_factory.mktemp("tiny") / "config.json"
    path.write_text(json.dumps(TINY_CONFIG))
    return {
        "model": str(path),
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "device": "cpu",
        "num_kv_blocks": 160,
        "max_num_seqs": 32,
        "max_num_batched_tokens": 64,
        "decode_headroom_tokens": 0,
        "restart_backoff_s": 0.1,
        "worker_timeout_s": 6.0,  # a loaded machine is no failure
    }


@pytest.fixture(scope="module")
def expected(settings: dict[str, Any]) -> list[list[list[int]]]:
    return tokens_of_one_engine(settings, PROMPTS, PARAMS)


@pytest.fixture(scope="module")
def llm(ray_cluster: None, settings: dict[str, Any]) -> Iterator[LLM]:
    with LLM(channel="shared", **settings) as llm:
        yield llm


def row(llm: LLM, worker_id: str) -> dict[str, Any]:
    return next(each for each in llm.status()["workers"] if each["worker_id"] == worker_id)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.05)


def test_it_says_what_one_worker_says(llm: LLM, expected: list[list[list[int]]]) -> None:
    """Also from a warm prefix cache; decodes were preempted, and nothing was sent."""
    for _ in range(2):
        assert tokens(llm.generate(PROMPTS, PARAMS, use_tqdm=False)) == expected
    guest, lender = row(llm, "prefill-0"), row(llm, "decode-0")
    assert guest["channels"] == {"decode-0": "shared"} and guest["sent"] == {}
    assert lender["preemptions"] > 0
    wait_for(lambda: not in_use(llm.status()))


def test_the_first_token_may_be_the_last(llm: LLM, settings: dict[str, Any]) -> None:
    """A guest has no blocks for it: it takes a lease like any other."""
    params = [ONE_TOKEN] * 4
    assert tokens(llm.generate(PROMPTS[:4], params, use_tqdm=False)) == tokens_of_one_engine(
        settings, PROMPTS[:4], params
    )
    wait_for(lambda: not in_use(llm.status()))


@pytest.mark.parametrize(("victim", "sign"), [("prefill-0", signal.SIGKILL), ("decode-0", signal.SIGSTOP)])
def test_streams_outlive_either(llm: LLM, expected: list[list[list[int]]], victim: str, sign: signal.Signals) -> None:
    """With the lender its guest ends; without its guest the lender goes on."""
    before = {name: row(llm, name)["pid"] for name in ("prefill-0", "decode-0")}
    said: list[list[RequestOutput]] = []
    asking = threading.Thread(target=lambda: said.append(llm.generate(PROMPTS, PARAMS, use_tqdm=False)))
    asking.start()
    wait_for(lambda: row(llm, "decode-0").get("running", 0) > 0)
    os.kill(before[victim], sign)
    asking.join(PATIENCE_S)
    assert [tokens(outputs) for outputs in said] == [expected]

    def replaced() -> set[str]:
        return {name for name, pid in before.items() if row(llm, name).get("pid", pid) != pid}

    wait_for(lambda: llm.status()["state"] == "serving" and victim in replaced() and not in_use(llm.status()))
    assert replaced() == ({"prefill-0"} if victim == "prefill-0" else {"prefill-0", "decode-0"})
    assert all(not os.path.exists(f"/proc/{before[name]}") for name in replaced())
