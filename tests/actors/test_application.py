"""The Serve application with real actors and the real model, asked by real clients over HTTP."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import psutil
import pytest
from ray import serve
from smol_application import (
    APP,
    CONFIG,
    NUM_STORIES,
    PARIS,
    QUEUE_BOUND,
    is_controller,
    nothing_in_use,
    stream_story,
    tells,
    wait_for,
    workers,
)

from pdray.actors.client import check_integrity, describe
from pdray.cli import wait_until_ready
from pdray.serve import build
from pdray.testing.patience import PATIENCE_S

pytestmark = pytest.mark.ray
NO_OTHERS = {"additionalProperties": False}
CITY = {"city": {"type": "string", "maxLength": 20}}


@pytest.fixture(scope="module")
def url(ray_cluster: None) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(build(CONFIG), name=APP, route_prefix="/")
    address = f"http://127.0.0.1:{port}"
    assert httpx.get(f"{address}/health", timeout=10).status_code == 200  # as soon as Serve says that it runs
    yield address
    serve.shutdown()


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=PATIENCE_S)


def test_chat_streaming_and_not(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="smol", messages=PARIS, max_tokens=24, temperature=0)
    text = answer.choices[0].message.content
    assert text is not None and "Paris" in text
    assert answer.usage is not None and answer.usage.completion_tokens > 0
    chunks = list(
        client.chat.completions.create(
            model="smol",
            messages=PARIS,
            max_tokens=24,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == text
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == answer.usage.completion_tokens
    timings = chunks[-1].to_dict()["timings"]
    assert timings["ttft_ms"] > 0 and "ttft_unexplained_ms" in timings


def test_completions_n_logprobs_stop_and_seed(client: openai.OpenAI) -> None:
    def once() -> openai.types.Completion:
        return client.completions.create(
            model="smol", prompt="Once upon a time", n=2, logprobs=3, seed=5, temperature=1.0, max_tokens=12
        )

    first, second = once(), once()
    assert [c.text for c in first.choices] == [c.text for c in second.choices]
    assert first.choices[0].text != first.choices[1].text
    assert first.choices[0].logprobs is not None and len(first.choices[0].logprobs.tokens or []) == 12
    stopped = client.completions.create(
        model="smol", prompt="Count: one, two, three,", stop=[" five"], temperature=0, max_tokens=24
    )
    assert stopped.choices[0].finish_reason == "stop" and "five" not in stopped.choices[0].text


def test_a_prompt_is_scored_as_it_would_be_drawn(client: openai.OpenAI) -> None:
    """As lm_eval asks: prefilled on one worker, which tells the scores, and nothing is decoded."""
    prompt = "The capital of France is"
    drawn = client.completions.create(model="smol", prompt=prompt, max_tokens=3, temperature=0, logprobs=1)
    text = drawn.choices[0].text
    for max_tokens in (0, 1):
        scored = client.completions.create(
            model="smol", prompt=prompt + text, max_tokens=max_tokens, temperature=0, logprobs=1, echo=True
        )
        choice, own = scored.choices[0], drawn.choices[0].logprobs
        assert choice.logprobs is not None and own is not None and own.token_logprobs is not None
        assert choice.text.startswith(prompt + text) and scored.usage is not None
        assert scored.usage.completion_tokens == max_tokens and choice.finish_reason == "length"
        num = scored.usage.prompt_tokens
        assert choice.logprobs.token_logprobs is not None and choice.logprobs.token_logprobs[0] is None
        assert len(choice.logprobs.token_logprobs) == num + max_tokens
        assert choice.logprobs.token_logprobs[num - 3 : num] == pytest.approx(own.token_logprobs, abs=1e-3)
        assert choice.logprobs.tokens is not None and choice.logprobs.tokens[num - 3 : num] == own.tokens


def test_metrics_of_the_apis_own_port(url: str, client: openai.OpenAI) -> None:
    """They count what was asked, under both names, and know the decode worker's pool."""

    def samples() -> dict[str, float]:
        text = httpx.get(f"{url}/metrics", timeout=10).text
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in text.splitlines() if line[0] != "#"}

    def value(of: dict[str, float], name: str) -> float:
        [found] = [value for key, value in of.items() if key.startswith(name + "{")]
        return found

    before = samples()
    answer = client.chat.completions.create(model="smol", messages=PARIS, max_tokens=5, extra_body={"ignore_eos": True})
    assert answer.usage is not None and answer.usage.completion_tokens == 5
    after = samples()
    for name, added in (
        ("vllm:generation_tokens_total", 5),
        ("pdray_generation_tokens_total", 5),
        ("vllm:prompt_tokens_total", answer.usage.prompt_tokens),
        ("vllm:request_generation_tokens_count", 1),
        ("vllm:time_to_first_token_seconds_count", 1),
        ("vllm:request_time_per_output_token_seconds_count", 1),
    ):
        assert value(after, name) - value(before, name) == added, name
    assert 0 <= value(after, "vllm:kv_cache_usage_perc") < 1 and value(after, "vllm:num_requests_running") == 0
    assert any('num_gpu_blocks="512"' in key for key in after)


def test_tools_are_described_and_answers_parsed(url: str, client: openai.OpenAI) -> None:
    """Through the whole stack: the model's template has no place for tools, and they are in its prompt all the same."""
    function = {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": CITY, "required": ["city"], **NO_OTHERS},
    }
    tools: list[Any] = [{"type": "function", "function": function}]
    counted = httpx.post(f"{url}/tokenize", json={"messages": PARIS, "tools": tools, "return_token_strs": True}).json()
    assert "get_weather" in "".join(counted["token_strs"])
    answer = client.chat.completions.create(model="smol", messages=PARIS, tools=tools, max_tokens=8, temperature=0)
    assert answer.usage is not None and answer.usage.prompt_tokens == counted["count"]
    choice: Any = {"type": "function", "function": {"name": "get_weather"}}
    for wanted, reason in ((choice, "stop"), ("required", "tool_calls")):
        answer = client.chat.completions.create(
            model="smol",
            messages=PARIS,
            tools=tools,
            tool_choice=wanted,
            parallel_tool_calls=False,
            max_tokens=128,
            temperature=0,
        )
        [call] = answer.choices[0].message.tool_calls or []
        assert call.type == "function" and call.function.name == "get_weather"
        assert isinstance(json.loads(call.function.arguments)["city"], str)
        assert answer.choices[0].finish_reason == reason
    response = client.responses.create(model="smol", input=PARIS[0]["content"], max_output_tokens=24, temperature=0)
    assert "Paris" in response.output_text


def test_errors_have_openai_shape(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt="x")
    with pytest.raises(openai.BadRequestError, match="1024"):
        client.completions.create(model="smol", prompt=[1] * 2000)
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.completions.create(model="smol", prompt="x", temperature=-1)


async def test_overload_answers_429_and_the_rest_finish(url: str) -> None:
    """64 at once: 8 places in the batch, 8 in the queue, the others are refused at once."""
    body = {"model": "smol", "prompt": "The sky is", "max_tokens": 16, "temperature": 0, "ignore_eos": True}
    async with httpx.AsyncClient(timeout=PATIENCE_S, limits=httpx.Limits(max_connections=64)) as http:
        answers = await asyncio.gather(*(http.post(f"{url}/v1/completions", json=body) for _ in range(64)))
    refused = [a for a in answers if a.status_code == 429]
    served = [a for a in answers if a.status_code == 200]
    assert len(refused) + len(served) == 64
    assert refused and all(int(a.headers["retry-after"]) >= 1 for a in refused)
    assert len(served) >= QUEUE_BOUND
    assert len({a.json()["choices"][0]["text"] for a in served}) == 1
    assert all(a.json()["usage"]["completion_tokens"] == 16 for a in served)
    wait_for(nothing_in_use)


async def test_disconnect_frees_both_workers(url: str) -> None:
    body = {"model": "smol", "prompt": "Tell me", "max_tokens": 800, "ignore_eos": True, "stream": True}
    async with (
        httpx.AsyncClient(timeout=PATIENCE_S) as http,
        http.stream("POST", f"{url}/v1/completions", json=body) as response,
    ):
        assert response.status_code == 200
        async for _ in response.aiter_lines():
            break
    wait_for(nothing_in_use)


@pytest.fixture(scope="module")
def stories(client: openai.OpenAI) -> list[str]:
    """What the streams say undisturbed."""
    with ThreadPoolExecutor(NUM_STORIES) as pool:
        return list(pool.map(lambda number: stream_story(client, number), range(NUM_STORIES)))


@pytest.mark.parametrize(
    "victims", [["coordinator", "prefill", "decode"], ["stopped decode"], ["stopped coordinator"]], ids=" and ".join
)
def test_streams_go_on_when_processes_die(
    url: str, client: openai.OpenAI, stories: list[str], victims: list[str]
) -> None:
    """Streams, free and under grammars, then SIGKILL or SIGSTOP: every text is the undisturbed one, and the dead are
    replaced."""
    started = [threading.Event() for _ in stories]
    with ThreadPoolExecutor(len(stories)) as pool:
        answers = [pool.submit(stream_story, client, number, event) for number, event in enumerate(started)]
        assert all(event.wait(PATIENCE_S) for event in started)
        before = {row["worker_id"]: row["pid"] for row in workers()}
        for victim in victims:
            if victim.endswith("coordinator"):
                os.kill(describe(APP)["pid"], signal.SIGSTOP if victim.startswith("stopped") else signal.SIGKILL)
            else:
                worker_id = f"{victim.removeprefix('stopped ')}-0"
                os.kill(before[worker_id], signal.SIGSTOP if victim.startswith("stopped") else signal.SIGKILL)
        assert [answer.result(timeout=PATIENCE_S) for answer in answers] == stories

    def replaced() -> bool:
        """The dead are; the others are not."""
        return {row["worker_id"] for row in workers() if row.get("pid", 0) not in (0, before[row["worker_id"]])} == {
            worker_id for worker_id in before if any(worker_id.startswith(victim.split()[-1]) for victim in victims)
        }

    wait_for(replaced)
    wait_until_ready(url, timeout_s=60)
    answer = client.chat.completions.create(model="smol", messages=PARIS, max_tokens=24, temperature=0)
    assert "Paris" in (answer.choices[0].message.content or "")
    wait_for(nothing_in_use)
    assert all(not problems for problems in check_integrity(APP).values())


def test_a_router_replica_that_hangs_is_ended_by_its_coordinator(
    url: str, client: openai.OpenAI, stories: list[str]
) -> None:
    """Serve would wait for its streams, for the grace; nobody else is replaced."""
    before = {row["pid"] for row in workers()}
    wait_for(lambda: describe(APP)["routers"])  # of a Coordinator that has just started, until its router watches it
    (router,) = describe(APP)["routers"]
    os.kill(router["pid"], signal.SIGSTOP)
    told: list[str] = []

    def has_ended() -> bool:
        told.extend(describe(APP)["suspicions"])
        return not psutil.pid_exists(router["pid"])

    wait_for(has_ended)
    assert any(suspicion.startswith(f"{router['router_id']}: no watch") for suspicion in told)
    wait_until_ready(url, timeout_s=PATIENCE_S)
    assert tells(client, stories[0])
    assert {row["pid"] for row in workers()} == before


def test_dead_workers_are_replaced_while_serves_controller_hangs(url: str) -> None:
    (controller,) = filter(is_controller, psutil.Process().children(recursive=True))
    before = {row["worker_id"]: row["pid"] for row in workers()}
    controller.suspend()
    try:
        os.kill(before["decode-0"], signal.SIGKILL)
        wait_for(lambda: {row["worker_id"] for row in workers() if row.get("pid", 0) not in (0, *before.values())})
        wait_until_ready(url, timeout_s=PATIENCE_S)
    finally:
        controller.resume()
    assert {row["worker_id"] for row in workers() if row["pid"] != before[row["worker_id"]]} == {"decode-0"}


def test_a_configuration_that_cannot_start_changes_nothing(url: str, client: openai.OpenAI, stories: list[str]) -> None:
    """Serve says why, and the one before goes on."""
    before = {row["pid"] for row in workers()}
    broken = CONFIG.model_copy(update={"model": "/nowhere/model"})
    with pytest.raises(RuntimeError, match="failed"):
        serve.run(build(broken), name=APP, route_prefix="/")
    deployments = serve.status().applications[APP].deployments
    assert "there is no such file or folder" in deployments["workers"].message
    assert httpx.get(f"{url}/health", timeout=10).status_code == 200
    assert tells(client, stories[0])
    assert {row["pid"] for row in workers()} == before


def test_streams_go_on_while_the_configuration_changes(url: str, client: openai.OpenAI, stories: list[str]) -> None:
    """The old workers end their streams, the new ones take what comes then; Serve says so when they do."""
    before = {row["pid"] for row in workers()}
    started = [threading.Event() for _ in stories]
    with ThreadPoolExecutor(len(stories)) as pool:
        answers = [pool.submit(stream_story, client, number, event) for number, event in enumerate(started)]
        assert all(event.wait(PATIENCE_S) for event in started)
        serve.run(build(CONFIG.model_copy(update={"max_queue_size": 4})), name=APP, route_prefix="/")
        assert httpx.get(f"{url}/health", timeout=10).status_code == 200
        assert [answer.result(timeout=PATIENCE_S) for answer in answers] == stories
    assert tells(client, stories[0])

    def only_new() -> bool:
        state = describe(APP)
        return "next" not in state and before.isdisjoint(row.get("pid", 0) for row in state["workers"])

    wait_for(only_new, 60)
    assert serve.status().applications[APP].status == "RUNNING"
    wait_for(nothing_in_use)
