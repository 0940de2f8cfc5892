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


def sse(value: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + encode_json(value) + b"\n\n"


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

    def entry(logprob: Logprob) -> dict[str, Any]:
        token = logprob.decoded_token or ""
        return {"token": token, "logprob": _finite(logprob), "bytes": list(token.encode())}

    return {
        "content": [
            entry(step[token_id]) | {"top_logprobs": [entry(top) for top in _top(step, num_top)]}
            for token_id, step in zip(token_ids, logprobs, strict=True)
        ],
        "refusal": None,
    }


def completion_logprobs(
    token_ids: Sequence[int], logprobs: Sequence[dict[int, Logprob]] | None, num_top: int, text_offset: int
) -> dict[str, Any] | None:
    """openai's completion Logprobs of some tokens whose text begins at text_offset.

    As in OpenAI's API, top_logprobs hold the sampled token too, so they may have num_top + 1 entries.
    """
    if logprobs is None:
        return None
    tokens = [step[token_id].decoded_token or "" for token_id, step in zip(token_ids, logprobs, strict=True)]
    offsets = []
    for token in tokens:
        offsets.append(text_offset)
        text_offset += len(token)
    return {
        "tokens": tokens,
        "token_logprobs": [_finite(step[token_id]) for token_id, step in zip(token_ids, logprobs, strict=True)],
        "top_logprobs": [
            {top.decoded_token or "": _finite(top) for top in _top(step, num_top, also=token_id)}
            for token_id, step in zip(token_ids, logprobs, strict=True)
        ],
        "text_offset": offsets,
    }


def _top(step: dict[int, Logprob], num_top: int, *, also: int | None = None) -> list[Logprob]:
    """The most likely tokens, best first, and one more whatever its rank."""
    chosen = (entry for token_id, entry in step.items() if entry.rank <= num_top or token_id == also)
    return sorted(chosen, key=lambda entry: entry.rank)


def _finite(entry: Logprob) -> float:
    return max(entry.logprob, LOWEST_LOGPROB)


Envelope = Callable[[list[dict[str, Any]]], dict[str, Any]]


def envelope(object_name: str, response_id: str, created: int, model: str) -> Envelope:
    """Everything around the choices, which is the same for all chunks of an answer."""
    head = {"id": response_id, "object": object_name, "created": created, "model": model}
    return lambda choices: {**head, "choices": choices}
