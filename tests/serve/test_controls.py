"""logit_bias, allowed_token_ids, bad_words, cache_salt and truncate_prompt_tokens over HTTP."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from pdray.errors import InvalidRequestError
from pdray.router.validation import tokenize_bad_words
from pdray.sampling_params import SamplingParams

BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "x"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}]},
}


@pytest.mark.parametrize("path", BODIES)
async def test_the_router_is_asked_for_them(http: httpx.AsyncClient, router: Any, path: str) -> None:
    fields = {
        "logit_bias": {"65": -100, "66": 2.5},
        "allowed_token_ids": [65, 66],
        "bad_words": ["ab"],
        "cache_salt": "tenant",
    }
    answer = await http.post(path, json={**BODIES[path], **fields})
    assert answer.status_code == 200, answer.text
    params = router.requests[-1].params
    assert params.logit_bias == {65: -100.0, 66: 2.5} and params.allowed_token_ids == (65, 66)
    assert params.bad_words == ("ab",) and params.cache_salt == "tenant"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("logit_bias", {"a": 1}),
        ("logit_bias", {"-1": 1}),
        ("logit_bias", {"07": 1, "7": 2}),
        ("logit_bias", {"65": 101}),
        ("logit_bias", {"65": "1"}),
        ("logit_bias", {str(i): 1 for i in range(2000)}),
        ("allowed_token_ids", []),
        ("allowed_token_ids", [-1]),
        ("bad_words", [""]),
        ("bad_words", ["  "]),
        ("bad_words", ["x"] * 300),
        ("cache_salt", ""),
        ("cache_salt", 5),
    ],
)
@pytest.mark.parametrize("path", BODIES)
async def test_what_they_may_not_be(http: httpx.AsyncClient, router: Any, path: str, field: str, value: Any) -> None:
    answer = await http.post(path, json={**BODIES[path], field: value})
    error = answer.json()["error"]
    assert answer.status_code == 400 and field in error["message"] + str(error["param"]), answer.text
    assert not router.requests


async def test_bad_words_are_tokenized_with_a_space_and_without(router: Any) -> None:
    params = tokenize_bad_words(SamplingParams(bad_words=("ab",)), router.tokenizer, 200)
    assert params.bad_words_token_ids == ((97, 98), (32, 97, 98))


async def test_ids_outside_the_vocabulary_are_refused(router: Any) -> None:
    with pytest.raises(InvalidRequestError, match="allowed_token_ids has token id 300"):
        tokenize_bad_words(SamplingParams(allowed_token_ids=(300,)), router.tokenizer, 200)


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("name", ["stop_token_ids", "allowed_token_ids", "logit_bias"])
async def test_the_answer_names_such_an_id(http: httpx.AsyncClient, router: Any, path: str, name: str) -> None:
    router.vocab_size = 200
    value = {"199": 1, "200": 1} if name == "logit_bias" else [199, 200]
    answer = await http.post(path, json={**BODIES[path], name: value})
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"] == name, answer.text
    assert "token id 200" in error["message"] and "200 tokens" in error["message"]
    fine = {"199": 1} if name == "logit_bias" else [199]
    assert (await http.post(path, json={**BODIES[path], name: fine})).status_code == 200


@pytest.mark.parametrize(
    ("prompt", "wanted", "kept"),
    [
        ("abcdef", 4, "cdef"),
        ("abcdef", 40, "abcdef"),
        ([97, 98, 99], 2, "bc"),
        ("x" * 5000 + "end", 3, "end"),
        ("x" * 5000 + "end", -1, "x" * 187 + "end"),  # 200 tokens of context, 10 of output
    ],
)
async def test_prompts_are_cut_at_their_beginning(
    http: httpx.AsyncClient, router: Any, prompt: Any, wanted: int, kept: str
) -> None:
    body = {"prompt": prompt, "max_tokens": 10, "truncate_prompt_tokens": wanted, "truncation_side": "left"}
    answer = await http.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    assert router.requests[-1].output.prompt_token_ids == [*kept.encode()]


@pytest.mark.parametrize("wanted", [0, -2, 200, 10**6])
async def test_what_cannot_be_kept_is_refused(http: httpx.AsyncClient, router: Any, wanted: int) -> None:
    answer = await http.post("/v1/completions", json={"prompt": "abc", "truncate_prompt_tokens": wanted})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "truncate_prompt_tokens"
    assert not router.requests


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"allowed_token_ids": [97], "bad_words": ["a"]}, "allowed_token_ids"),
        ({"bad_words": ["a"]}, "bad_words"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"response_format": {"type": "text"}, "structured_outputs": {"choice": ["a"]}}, "structured_outputs"),
    ],
)
async def test_where_no_token_is_left_the_error_names_what_left_none(
    http: httpx.AsyncClient, router: Any, fields: dict[str, Any], param: str, stream: bool
) -> None:
    router.refusals = {0: InvalidRequestError("no token of the vocabulary", "structured_outputs")}
    answer = await http.post("/v1/completions", json={"prompt": "x", "stream": stream, **fields})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param


async def test_a_prompt_that_is_cut_is_echoed_as_it_was_computed(http: httpx.AsyncClient) -> None:
    body = {"prompt": "abcdef", "max_tokens": 0, "truncate_prompt_tokens": 2, "echo": True, "logprobs": 0}
    [choice] = (await http.post("/v1/completions", json=body)).json()["choices"]
    assert choice["text"] == "ef"
    assert choice["logprobs"]["tokens"] == ["e", "f"] and choice["logprobs"]["text_offset"] == [0, 1]
