"""One streamed completion request, timed from the client's side."""

from __future__ import annotations

import json
import os
import time
from collections.abc import AsyncIterator
from typing import Any

import aiohttp

from pdray.bench.serving_metrics import RequestRecord
from pdray.bench.timings import timings_of_response
from pdray.bench.workload import BenchRequest

MAX_ERROR_CHARS = 300


def authorization() -> dict[str, str]:
    """The header that servers with an API key ask for: the key of $PDRAY_API_KEY, else of $OPENAI_API_KEY, if any."""
    key = (os.environ.get("PDRAY_API_KEY") or os.environ.get("OPENAI_API_KEY") or "").strip()
    return {"Authorization": f"Bearer {key}"} if key else {}


async def sse_data(content: AsyncIterator[bytes]) -> AsyncIterator[str]:
    """The data of each server-sent event, however the stream was cut into pieces. Comments are skipped."""
    buffer = b""
    async for piece in content:
        buffer = (buffer + piece).replace(b"\r\n", b"\n")
        *events, buffer = buffer.split(b"\n\n")
        for event in events:
            lines = [line[5:].strip() for line in event.split(b"\n") if line.startswith(b"data:")]
            if lines:
                yield b"\n".join(lines).decode()


async def send_request(
    session: aiohttp.ClientSession, url: str, model: str, request: BenchRequest, *, ignore_eos: bool
) -> RequestRecord:
    """POST to a /v1/completions endpoint, greedily decoded, and read the stream to its end.

    Never raises for what the server or the network did: the record says it.
    """
    record = RequestRecord(prompt_len=len(request.prompt_token_ids))
    body = {
        "model": model,
        "prompt": request.prompt_token_ids,
        "max_tokens": request.output_len,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": ignore_eos,
    }
    started = time.perf_counter()
    try:
        async with session.post(url, json=body) as response:
            record.status = response.status
            if response.status != 200:
                record.outcome = "rejected" if response.status == 429 else "failed"
                record.retry_after_s = _seconds(response.headers.get("Retry-After"))
                record.error = f"HTTP {response.status}: {_error_text(await response.text())}"
                return record
            await _read_stream(response, record, started)
    except (aiohttp.ClientError, TimeoutError, OSError, json.JSONDecodeError) as error:
        record.error = f"{type(error).__name__}: {error}"[:MAX_ERROR_CHARS]
    return record


async def _read_stream(response: aiohttp.ClientResponse, record: RequestRecord, started: float) -> None:
    """Fill the record from the stream. Only [DONE] after at least one token makes it "ok"."""
    latest = started
    num_chunks = 0
    async for data in sse_data(response.content.iter_any()):
        if data == "[DONE]":
            if record.error or not num_chunks:
                record.error = record.error or "the stream ended without a token"
                return
            record.outcome = "ok"
            record.e2el = latest - started
            record.output_len = record.output_len or num_chunks
            return
        chunk: dict[str, Any] = json.loads(data)
        if "error" in chunk:
            record.error = _error_text(data)
            continue
        if chunk.get("choices"):
            now = time.perf_counter()
            if num_chunks:
                record.itls.append(now - latest)
            else:
                record.ttft = now - started
            num_chunks += 1
            latest = now
        if usage := chunk.get("usage"):
            record.output_len = usage["completion_tokens"]
            record.prompt_len = usage["prompt_tokens"]
        if timings := chunk.get("timings"):
            record.timings = timings_of_response(timings)
    record.error = record.error or "the stream broke off before [DONE]"


def _error_text(body: str) -> str:
    """The message of OpenAI's error shape, or the body as it is."""
    try:
        text = json.loads(body)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        text = body
    return str(text)[:MAX_ERROR_CHARS]


def _seconds(retry_after: str | None) -> float | None:
    try:
        return None if retry_after is None else float(retry_after)
    except ValueError:
        return None
