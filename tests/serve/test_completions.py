"""/v1/completions, asked by openai's client, parsed by openai's types."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import openai
import pytest
from openai.types import Completion

from pdray.testing.patience import PATIENCE_S

REPLY = "The capital of France is Paris."


async def test_one_prompt(client: openai.AsyncOpenAI, router: Any) -> None:
    answer = await client.completions.create(model="smol", prompt="Where?", max_tokens=100)
    assert answer.object == "text_completion" and answer.model == "smol" and answer.id.startswith("cmpl-")
    [choice] = answer.choices
    assert (choice.index, choice.text, choice.finish_reason, choice.logprobs) == (0, REPLY, "stop", None)
    usage = answer.usage
    assert usage is not None and usage.prompt_tokens_details is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (6, len(REPLY) + 1)  # the end-of-sequence token
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.prompt_tokens_details.cached_tokens == 3
    assert not router.aborted and not router.num_running


async def test_timings_are_in_milliseconds_and_name_the_remainders(client: openai.AsyncOpenAI) -> None:
    timings = (await client.completions.create(model="smol", prompt="x")).to_dict()["timings"]
    assert isinstance(timings, dict)
    assert timings["queue_ms"] == 1.0
    assert timings["ttft_ms"] > 0 and timings["e2e_ms"] >= timings["ttft_ms"]
    assert timings["prefill_ms"] is None
    assert {"ttft_unexplained_ms", "first_gap_unexplained_ms"} < timings.keys()


async def test_the_synchronous_client(url: str) -> None:
    def ask() -> tuple[str, str]:
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=PATIENCE_S) as client:
            whole = client.completions.create(model="smol", prompt="x", max_tokens=100).choices[0].text
            stream = client.completions.create(model="smol", prompt="x", max_tokens=100, stream=True)
            return whole, "".join(chunk.choices[0].text for chunk in stream)

    assert await asyncio.to_thread(ask) == (REPLY, REPLY)


async def test_default_is_16_tokens(client: openai.AsyncOpenAI) -> None:
    answer = await client.completions.create(model="smol", prompt="x")
    assert answer.choices[0].text == REPLY[:16] and answer.choices[0].finish_reason == "length"


@pytest.mark.parametrize(
    "prompt,num_prompts", [("ab", 1), (["ab", "cde"], 2), ([97, 98], 1), ([[97], [98, 99], [100]], 3)]
)
async def test_every_form_of_prompt(client: openai.AsyncOpenAI, router: Any, prompt: Any, num_prompts: int) -> None:
    answer = await client.completions.create(model="smol", prompt=prompt, n=2, echo=True, max_tokens=3)
    texts = [request.output.prompt or bytes(request.output.prompt_token_ids).decode() for request in router.requests]
    assert len(texts) == num_prompts
    assert [choice.index for choice in answer.choices] == list(range(2 * num_prompts))
    assert [choice.text for choice in answer.choices] == [text + "The" for text in texts for _ in range(2)]
    assert answer.usage is not None and answer.usage.completion_tokens == 3 * 2 * num_prompts


@pytest.mark.parametrize("prompt", ["ab", ["ab", "cde"]])
async def test_stream_equals_whole_answer(client: openai.AsyncOpenAI, prompt: Any) -> None:
    options: dict[str, Any] = {"model": "smol", "prompt": prompt, "n": 2, "echo": True, "max_tokens": 20}
    whole = await client.completions.create(**options)
    stream = await client.completions.create(**options, stream=True, stream_options={"include_usage": True})
    chunks = [chunk async for chunk in stream]
    assert len({chunk.id for chunk in chunks}) == 1
    texts = {choice.index: "" for choice in whole.choices}
    reasons: dict[int, str] = {}
    for chunk in chunks[:-1]:
        assert chunk.usage is None
        for choice in chunk.choices:
            assert choice.index not in reasons, "a chunk after the last one"
            texts[choice.index] += choice.text
            if choice.finish_reason is not None:
                reasons[choice.index] = choice.finish_reason
    assert [choice.text for choice in whole.choices] == list(texts.values())
    assert {choice.index: choice.finish_reason for choice in whole.choices} == reasons
    assert not chunks[-1].choices and chunks[-1].usage == whole.usage
    assert "timings" in chunks[-1].to_dict()


async def test_stream_bytes(http: httpx.AsyncClient) -> None:
    """The format to the byte, and finish_reason null in chunks, which openai's types demand."""
    body = {"model": "smol", "prompt": "x", "max_tokens": 3, "stream": True}
    response = await http.post("/v1/completions", json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    *events, end = response.content.split(b"\n\n")
    assert end == b"" and events[-1] == b"data: [DONE]"
    assert all(event.startswith(b"data: {") and b"\n" not in event for event in events[:-1])
    chunks = [json.loads(event[6:]) for event in events[:-1]]
    for chunk in chunks:
        Completion.model_validate(chunk, strict=True, extra="allow")
        assert "finish_reason" in chunk["choices"][0] and "usage" not in chunk
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"


async def test_continuous_usage(client: openai.AsyncOpenAI, router: Any) -> None:
    stream = await client.completions.create(
        model="smol",
        prompt="x",
        max_tokens=5,
        stream=True,
        stream_options={"include_usage": True, "continuous_usage_stats": True},  # type: ignore[typeddict-unknown-key]
    )
    counts = [chunk.usage.completion_tokens async for chunk in stream if chunk.usage is not None]
    assert counts == sorted(counts) and counts[-1] == 5 and len(counts) > 1


@pytest.mark.parametrize("stream", [False, True])
async def test_logprobs(client: openai.AsyncOpenAI, stream: bool) -> None:
    """Completion 1 samples a token that is not among the top: it is reported beside them."""
    options: dict[str, Any] = {"model": "smol", "prompt": "x", "n": 2, "logprobs": 2, "max_tokens": 8}
    if stream:
        choices = [c async for chunk in await client.completions.create(**options, stream=True) for c in chunk.choices]
    else:
        choices = (await client.completions.create(**options)).choices
    for index in (0, 1):
        found = [choice.logprobs for choice in choices if choice.index == index and choice.logprobs is not None]
        tokens = [token for part in found for token in part.tokens or []]
        assert "".join(tokens) == REPLY[:8]
        assert [at for part in found for at in part.text_offset or []] == list(range(8))
        logprobs = [value for part in found for value in part.token_logprobs or []]
        assert logprobs == [-1.0 if index == 0 else -9999.0] * 8
        for token, top in zip(tokens, [top for part in found for top in part.top_logprobs or []], strict=True):
            assert token in top and len(top) == 2 + index


@pytest.mark.parametrize("keep", [False, True])
async def test_stop_strings(client: openai.AsyncOpenAI, keep: bool) -> None:
    answer = await client.completions.create(
        model="smol",
        prompt="x",
        max_tokens=100,
        stop=["France", "zzz"],
        extra_body={"include_stop_str_in_output": keep},
    )
    [choice] = answer.choices
    assert choice.text == ("The capital of France" if keep else "The capital of ")
    assert choice.finish_reason == "stop" and choice.to_dict()["stop_reason"] == "France"


async def test_sampling_parameters_reach_the_router(client: openai.AsyncOpenAI, router: Any) -> None:
    extra = {
        "top_k": 7,
        "min_p": 0.25,
        "repetition_penalty": 1.5,
        "min_tokens": 2,
        "ignore_eos": True,
        "stop_token_ids": [5, 6],
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,
    }
    given = {"temperature": 0.5, "top_p": 0.75, "seed": 11, "max_tokens": 40, "n": 3}
    given |= {"presence_penalty": 0.5, "frequency_penalty": -0.5}
    await client.completions.create(
        model="smol", prompt="x", stop="!", user="me", extra_body={**extra, "priority": -3}, **given
    )
    [request] = router.requests
    for name, value in {**extra, **given, "stop": ("!",), "stop_token_ids": (5, 6)}.items():
        assert getattr(request.params, name) == value, name
    assert router.priorities == [-3]
    assert request.params.logprobs is None


async def test_nulls_mean_defaults(http: httpx.AsyncClient, router: Any) -> None:
    names = ["n", "temperature", "top_p", "top_k", "seed", "stop", "stop_token_ids", "max_tokens", "logprobs", "echo"]
    names += ["stream", "stream_options", "model", "priority", "suffix", "best_of", "user", "response_format", "tools"]
    response = await http.post("/v1/completions", json={"prompt": "x", **dict.fromkeys(names)})
    assert response.status_code == 200, response.text
    assert router.requests[0].params.n == 1 and router.requests[0].params.temperature == 1.0


async def test_request_id(http: httpx.AsyncClient, router: Any) -> None:
    for given, used in (("trace-1", True), ("a b", False), ("x" * 129, False), ("x" * 128, True)):
        response = await http.post("/v1/completions", json={"prompt": "x"}, headers={"X-Request-Id": given})
        assert (given in response.json()["id"]) is used
        assert router.requests[-1].request_id == response.json()["id"]
    twice = [await http.post("/v1/completions", json={"prompt": "x"}, headers={"X-Request-Id": "t"}) for _ in range(2)]
    assert twice[0].json()["id"] != twice[1].json()["id"]


async def test_any_content_type(http: httpx.AsyncClient) -> None:
    for content_type in ("text/plain", "application/json; charset=utf-8", "nonsense"):
        response = await http.post(
            "/v1/completions", content=b'{"prompt": "x"}', headers={"Content-Type": content_type}
        )
        assert response.status_code == 200


@pytest.mark.parametrize("given,taken", [(-1, None), (-2, -2), (-(2**63),) * 2, (0, 0), (7.0, 7), (2**63 - 1,) * 2])
async def test_seeds(http: httpx.AsyncClient, router: Any, given: float, taken: int | None) -> None:
    """-1 is none, as in vLLM: two requests draw two. Other negative ones are seeds of their own."""
    for _ in range(2):
        assert (await http.post("/v1/completions", json={"prompt": "x", "seed": given})).status_code == 200
    seeds = [request.params.seed for request in router.requests]
    assert len({*seeds}) == (2 if taken is None else 1)
    assert taken is None or seeds[0] == taken


async def test_whole_floats_are_integers(http: httpx.AsyncClient, router: Any) -> None:
    given = {"max_tokens": 4.0, "n": 2.0, "top_k": -1.0, "seed": 7.0, "min_tokens": 1e0, "logprobs": 2.0}
    given |= {"stop_token_ids": [5.0], "priority": -3.0, "best_of": 2.0}
    answer = await http.post("/v1/completions", json={"prompt": "x", **given})
    assert answer.status_code == 200 and len(answer.json()["choices"]) == 2, answer.text
    [request] = router.requests
    for name in ("max_tokens", "n", "top_k", "seed", "min_tokens", "logprobs"):
        value = getattr(request.params, name)
        assert value == given[name] and isinstance(value, int)
    assert request.params.stop_token_ids == (5,) and router.priorities == [-3]
    body = {"messages": [{"role": "user", "content": "x"}], "max_completion_tokens": 3.0, "top_logprobs": 0.0}
    assert (await http.post("/v1/chat/completions", json=body)).json()["usage"]["completion_tokens"] == 3


async def test_no_top_logprobs_need_no_logprobs(http: httpx.AsyncClient) -> None:
    body = {"messages": [{"role": "user", "content": "x"}], "top_logprobs": 0}
    answer = await http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200 and answer.json()["choices"][0]["logprobs"] is None


@pytest.mark.parametrize("echo", [False, True])
async def test_ids_that_pad_the_vocabulary(http: httpx.AsyncClient, router: Any, echo: bool) -> None:
    """The tokenizer has 129; a model that has 160 may draw any of them, and clients send them back."""
    router.vocab_size = 160
    body = {"prompt": [72, 105, 159], "echo": echo, "max_tokens": 3}
    answer = await http.post("/v1/completions", json=body)
    assert answer.status_code == 200 and answer.json()["usage"]["prompt_tokens"] == 3
    assert router.requests[0].output.prompt_token_ids == [72, 105, 159]
    refused = await http.post("/v1/completions", json=body | {"prompt": [160]})
    assert refused.status_code == 400 and "[0, 160)" in refused.json()["error"]["message"]


async def test_a_token_that_only_the_tokenizer_has(http: httpx.AsyncClient, router: Any) -> None:
    router.vocab_size = 128
    refused = await http.post("/v1/completions", json={"prompt": "x<eos>"})
    assert refused.status_code == 400 and "'<eos>' (id 128)" in refused.json()["error"]["message"]


async def test_many_stop_strings(http: httpx.AsyncClient) -> None:
    stop = [*(f"[{number}]" for number in range(255)), "France"]
    answer = (await http.post("/v1/completions", json={"prompt": "x", "max_tokens": 40, "stop": stop})).json()
    assert answer["choices"][0]["text"] == "The capital of " and answer["choices"][0]["stop_reason"] == "France"
