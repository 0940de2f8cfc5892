"""prompt_logprobs, echo with logprobs, and max_tokens=0 over HTTP: what evaluation harnesses ask for."""

from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest

PROMPT = "abcd"
CHAT = {"messages": [{"role": "user", "content": "ab"}]}
TOP = {"c": -1.0, "d": -2.0}  # of every token of a prompt, beside itself; see ScriptedRouter


def expected(tokens: str) -> dict[str, Any]:
    """Logprobs of a text whose first token follows nothing."""
    steps = [{token: -3.0, **TOP} if token not in TOP else TOP for token in tokens[1:]]
    own = [TOP.get(token, -3.0) for token in tokens[1:]]
    return {"tokens": [*tokens], "token_logprobs": [None, *own], "top_logprobs": [None, *steps]}


@pytest.mark.parametrize("prompt", [PROMPT, [ord(char) for char in PROMPT]], ids=["text", "ids"])
@pytest.mark.parametrize("max_tokens", [0, 1])
async def test_echo_with_logprobs(client: openai.AsyncOpenAI, prompt: Any, max_tokens: int) -> None:
    """As lm-eval's loglikelihood asks: the prompt's own tokens are scored."""
    answer = await client.completions.create(model="smol", prompt=prompt, max_tokens=max_tokens, echo=True, logprobs=2)
    choice = answer.choices[0]
    assert choice.text == PROMPT + "T" * max_tokens and choice.finish_reason == "length"
    assert answer.usage is not None and answer.usage.completion_tokens == max_tokens
    assert choice.logprobs is not None
    logprobs = choice.logprobs.model_dump()
    assert logprobs["text_offset"] == [*range(4 + max_tokens)]
    for name, values in expected(PROMPT).items():
        assert logprobs[name][:4] == values and len(logprobs[name]) == 4 + max_tokens
    assert logprobs["tokens"][4:] == ["T"] * max_tokens


async def test_streamed_echo_with_logprobs(client: openai.AsyncOpenAI) -> None:
    """The prompt comes first, of each choice, and offsets go on behind it."""
    prompts = [PROMPT, "bc"]
    options: dict[str, Any] = {"model": "smol", "prompt": prompts, "n": 2, "max_tokens": 3, "echo": True, "logprobs": 2}
    chunks = [chunk async for chunk in await client.completions.create(stream=True, **options)]
    whole = await client.completions.create(**options)
    for choice in whole.choices:
        parts = [c for chunk in chunks for c in chunk.choices if c.index == choice.index]
        assert "".join(part.text for part in parts) == choice.text and parts[0].text == prompts[choice.index // 2]
        found = [part.logprobs.model_dump() for part in parts if part.logprobs is not None]
        assert choice.logprobs is not None
        for name, values in choice.logprobs.model_dump().items():
            assert [value for each in found for value in each[name]] == values


async def test_a_stream_of_the_prompt_alone(client: openai.AsyncOpenAI) -> None:
    stream = await client.completions.create(
        model="smol", prompt=PROMPT, max_tokens=0, echo=True, logprobs=0, stream=True
    )
    choices = [choice async for chunk in stream for choice in chunk.choices]
    assert "".join(choice.text for choice in choices) == PROMPT
    assert [choice.finish_reason for choice in choices][-1] == "length"


async def test_prompt_logprobs_are_vllms(http: httpx.AsyncClient, router: Any) -> None:
    body = {"prompt": PROMPT, "max_tokens": 2, "prompt_logprobs": 1}
    answer = (await http.post("/v1/completions", json=body)).json()
    found = answer["choices"][0]["prompt_logprobs"]
    assert found[0] is None and found[1] == {
        "98": {"logprob": -3.0, "rank": 3, "decoded_token": "b"},
        "99": {"logprob": -1.0, "rank": 1, "decoded_token": "c"},
    }
    assert found[2] == {"99": {"logprob": -1.0, "rank": 1, "decoded_token": "c"}} and len(found) == 4
    answer = (await http.post("/v1/chat/completions", json={**CHAT, "prompt_logprobs": 0})).json()
    assert len(answer["prompt_logprobs"]) == answer["usage"]["prompt_tokens"]
    assert all(len(step) == 1 for step in answer["prompt_logprobs"][1:])
    both = {"prompt": PROMPT, "max_tokens": 0, "prompt_logprobs": 2, "echo": True, "logprobs": 0}
    choice = (await http.post("/v1/completions", json=both)).json()["choices"][0]
    assert choice["logprobs"]["top_logprobs"][1] == {"b": -3.0} and len(choice["prompt_logprobs"][1]) == 3


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_nothing_but_the_prompt(http: httpx.AsyncClient, router: Any, path: str) -> None:
    body = {"prompt": "ab"} if path == "/v1/completions" else CHAT
    answer = (
        await http.post(path, json={**body, "max_tokens": 0, "n": 2, "logprobs": 1 if "prompt" in body else True})
    ).json()
    assert answer["usage"]["completion_tokens"] == 0 and len(answer["choices"]) == 2
    for choice in answer["choices"]:
        assert choice["finish_reason"] == "length"
        assert choice.get("text", "") == "" and choice.get("message", {}).get("content", "") in ("", None)
    assert router.requests[-1].params.max_tokens == 1, "a step that computes a prompt draws a token"


async def test_what_they_may_not_be(http: httpx.AsyncClient, router: Any) -> None:
    for fields in ({"prompt_logprobs": 21}, {"prompt_logprobs": -1}, {"prompt_logprobs": 1, "stream": True}):
        answer = await http.post("/v1/completions", json={"prompt": "x", **fields})
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "prompt_logprobs"
    assert not router.requests
