"""Answers in the shapes of openai's types, as plain dicts: one token's chunk must cost microseconds.

The tests parse every shape with openai's own types.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import msgspec

from pdray.outputs import Logprob, RequestOutput, RequestTimings

LOWEST_LOGPROB = -9999.0  # JSON has no -inf; the value is vLLM's

encode_json = msgspec.json.Encoder().encode


# JSON leaves them as they are, but many readers of streams split lines as Python's str.splitlines does. The encoder
# escapes the other line ends, which are control characters. As UTF-8 they occur within strings only.
LINE_ENDS = {char.encode(): b"\\u%04x" % ord(char) for char in "\u0085\u2028\u2029"}


def sse(value: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + one_line(encode_json(value)) + b"\n\n"


def one_line(json: bytes) -> bytes:
    """The same JSON, one line by any reader's rules."""
    for raw, escaped in LINE_ENDS.items():
        json = json.replace(raw, escaped)
    return json


SSE_DONE = b"data: [DONE]\n\n"


def usage(outputs: Sequence[RequestOutput]) -> dict[str, Any]:
    """openai.types.CompletionUsage of some requests."""
    prompt = sum(len(output.prompt_token_ids) for output in outputs)
    completion = sum(len(c.token_ids) for output in outputs for c in output.outputs)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(output.num_cached_tokens for output in outputs)},
    }


def timings_ms(timings: RequestTimings) -> dict[str, float | None]:
    """RequestTimings and its remainders in milliseconds: <part>_ms; null where a part does not apply."""
    names = [field.name for field in fields(RequestTimings)] + ["ttft_unexplained", "first_gap_unexplained"]
    values = ((name, getattr(timings, name)) for name in names)
    return {f"{name}_ms": None if value is None else round(value * 1e3, 3) for name, value in values}


def chat_logprobs(
    token_ids: Sequence[int], logprobs: Sequence[dict[int, Logprob]] | None, num_top: int
) -> dict[str, Any] | None:
    """openai's ChoiceLogprobs of some tokens."""
    if logprobs is None:
        return None

    def entry(token_id: int, logprob: Logprob) -> dict[str, Any]:
        piece = None if logprob.token_bytes is None else list(logprob.token_bytes)
        return {"token": _token(token_id, logprob), "logprob": _finite(logprob), "bytes": piece}

    return {
        "content": [
            entry(token_id, step[token_id]) | {"top_logprobs": [entry(*top) for top in _top(step, num_top)]}
            for token_id, step in zip(token_ids, logprobs, strict=True)
        ],
        "refusal": None,
    }


def completion_logprobs(
    token_ids: Sequence[int],
    logprobs: Sequence[dict[int, Logprob]] | None,
    num_top: int,
    text_offsets: Sequence[int] | None,
) -> dict[str, Any] | None:
    """openai's completion Logprobs of some tokens.

    As in OpenAI's API, top_logprobs hold the sampled token too, so they may have num_top + 1 entries. Their keys are
    tokens; of several that look the same, the sampled or else the most likely one has the name, and the others are
    called token_id:N, as by vLLM.
    """
    if logprobs is None:
        return None
    steps = list(zip(token_ids, logprobs, strict=True))
    return {
        "tokens": [_token(token_id, step[token_id]) for token_id, step in steps],
        "token_logprobs": [_finite(step[token_id]) for token_id, step in steps],
        "top_logprobs": [_top_by_name(step, num_top, token_id) for token_id, step in steps],
        "text_offset": list(text_offsets or ()),
    }


def echoed_logprobs(
    token_ids: Sequence[int],
    logprobs: Sequence[dict[int, Logprob] | None],
    num_top: int,
    text_offsets: Sequence[int],
    first_name: str,
) -> dict[str, Any]:
    """completion_logprobs() of a prompt's tokens; the first, called first_name, follows nothing and has none."""
    rest = completion_logprobs(token_ids[1:], [step for step in logprobs if step is not None], num_top, text_offsets)
    assert rest is not None
    firsts = {"tokens": first_name, "token_logprobs": None, "top_logprobs": None}
    return {name: [first, *rest[name]] for name, first in firsts.items()} | {"text_offset": list(text_offsets)}


def joined_logprobs(first: dict[str, Any], then: dict[str, Any] | None, num_chars: int) -> dict[str, Any]:
    """completion_logprobs() of two texts, the first of num_chars characters."""
    if then is None:
        return first
    moved = then | {"text_offset": [offset + num_chars for offset in then["text_offset"]]}
    return {name: [*values, *moved[name]] for name, values in first.items()}


def prompt_logprobs(logprobs: Sequence[dict[int, Logprob] | None], num_top: int) -> list[dict[str, Any] | None]:
    """vLLM's prompt_logprobs: for each token an object by token id, of it and of the most likely ones."""
    return [
        None
        if step is None
        else {
            str(token_id): {"logprob": _finite(entry), "rank": entry.rank, "decoded_token": entry.decoded_token}
            for i, (token_id, entry) in enumerate(step.items())
            if i == 0 or entry.rank <= num_top
        }
        for step in logprobs
    ]


def _top_by_name(step: dict[int, Logprob], num_top: int, sampled: int) -> dict[str, float]:
    names = {_token(sampled, step[sampled]): sampled}
    result = {}
    for token_id, entry in _top(step, num_top, also=sampled):
        name = _token(token_id, entry)
        if names.setdefault(name, token_id) != token_id:
            name = f"token_id:{token_id}"
        result[name] = _finite(entry)
    return result


def _token(token_id: int, entry: Logprob) -> str:
    """What a token is called; without a tokenizer as by vLLM."""
    return f"token_id:{token_id}" if entry.decoded_token is None else entry.decoded_token


def _top(step: dict[int, Logprob], num_top: int, *, also: int | None = None) -> list[tuple[int, Logprob]]:
    """The most likely tokens by id, best first, and one more whatever its rank."""
    chosen = (item for item in step.items() if item[1].rank <= num_top or item[0] == also)
    return sorted(chosen, key=lambda item: item[1].rank)


def _finite(entry: Logprob) -> float:
    return max(entry.logprob, LOWEST_LOGPROB)


Envelope = Callable[[list[dict[str, Any]]], dict[str, Any]]


def envelope(object_name: str, response_id: str, created: int, model: str) -> Envelope:
    """Everything around the choices, which is the same for all chunks of an answer."""
    head = {"id": response_id, "object": object_name, "created": created, "model": model}
    return lambda choices: {**head, "choices": choices}
