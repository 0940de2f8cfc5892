"""Clients: one request each, and everything that was seen of its answer."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from pdray.bench.client import sse_data

Body = dict[str, Any]
MODEL = "smol"
SUBJECTS = ("children", "sailors", "foxes", "painters", "robots", "farmers", "kings", "students")


@dataclass(slots=True)
class Answer:
    """What a client saw.

    Attributes:
        status: of the response; None if there was none.
        texts: by choice.
        num_tokens: usage.completion_tokens; None if the answer did not come to it.
        num_reasons: finish reasons seen, by choice.
        retry_after_s: of a refusal.
        error: of the response, the stream or the connection; "" if there was none.
        broken: the connection broke.
        ended: the whole answer came: the body, or the stream with its [DONE].
        left: the client went away before the end, as it was asked to.
        hung: the client gave up waiting.
        arrivals: times of time.monotonic() at which a stream's pieces came.
    """

    status: int | None = None
    texts: dict[int, str] = field(default_factory=dict)
    num_tokens: int | None = None
    num_reasons: Counter[int] = field(default_factory=Counter)
    retry_after_s: float | None = None
    error: str = ""
    broken: bool = False
    ended: bool = False
    left: bool = False
    hung: bool = False
    arrivals: list[float] = field(default_factory=list)
    finished_at: float = 0.0

    @property
    def outcome(self) -> str:
        """One of: left, hung, broken (the connection), refused, invalid, failed (told so), finished, cut (silently)."""
        for name in ("left", "hung", "broken"):
            if getattr(self, name):
                return name
        if self.status in (429, 503):
            return "refused"
        if self.status == 400:
            return "invalid"
        if self.error:
            return "failed"
        return "finished" if self.ended else "cut"

    @property
    def content(self) -> tuple[dict[int, str], int | None]:
        """What must be the same whenever the same is asked."""
        return self.texts, self.num_tokens


@dataclass(slots=True)
class Clients:
    """Many clients of one application, and how many pieces they have seen between them."""

    url: str
    session: aiohttp.ClientSession
    num_pieces: int = 0
    on_piece: Callable[[], None] | None = None

    async def ask(
        self,
        body: Body,
        *,
        timeout_s: float = 120.0,
        leave_after_s: float | None = None,
        leave_after: int | None = None,
    ) -> Answer:
        """Send one request and read its answer. Never raises for what the server or the network did.

        Args:
            leave_after_s: go away after so many seconds, whatever the state.
            leave_after: go away after so many pieces of a stream.
        """
        answer = Answer()
        limit = timeout_s if leave_after_s is None else leave_after_s
        try:
            async with asyncio.timeout(limit), self.session.post(f"{self.url}/v1/completions", json=body) as response:
                await self._read(response, answer, leave_after)
        except TimeoutError:
            answer.hung, answer.left = leave_after_s is None, leave_after_s is not None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            answer.broken, answer.error = True, f"{type(error).__name__}: {error}"
        answer.finished_at = time.monotonic()
        return answer

    async def _read(self, response: aiohttp.ClientResponse, answer: Answer, leave_after: int | None) -> None:
        answer.status = response.status
        if response.content_type != "text/event-stream":
            value = json.loads(await response.read())
            if response.status != 200:
                answer.error = value["error"]["message"]
                seconds = response.headers.get("Retry-After")
                answer.retry_after_s = None if seconds is None else float(seconds)
                return
            answer.texts = {choice["index"]: choice["text"] for choice in value["choices"]}
            answer.num_tokens = value["usage"]["completion_tokens"]
            answer.num_reasons.update(choice["index"] for choice in value["choices"] if choice["finish_reason"])
            answer.ended = True
            return
        async for data in sse_data(response.content.iter_any()):
            if data == "[DONE]":
                answer.ended = True
                continue
            self._take(json.loads(data), answer)
            if leave_after is not None and len(answer.arrivals) >= leave_after:
                answer.left = True
                response.close()
                return

    def _take(self, chunk: dict[str, Any], answer: Answer) -> None:
        if "error" in chunk:
            answer.error = chunk["error"]["message"]
            return
        for choice in chunk["choices"]:
            answer.texts[choice["index"]] = answer.texts.get(choice["index"], "") + choice["text"]
            answer.num_reasons[choice["index"]] += choice["finish_reason"] is not None
            answer.arrivals.append(time.monotonic())
            self.num_pieces += 1
            if self.on_piece is not None:
                self.on_piece()
        if usage := chunk.get("usage"):
            answer.num_tokens = usage["completion_tokens"]

    async def pieces(self, number: int, timeout_s: float = 120.0) -> None:
        """Returns once `number` more pieces have come.

        Raises:
            TimeoutError: they have not within timeout_s.
        """
        target, reached = self.num_pieces + number, asyncio.Event()
        self.on_piece = lambda: reached.set() if self.num_pieces >= target else None
        try:
            async with asyncio.timeout(timeout_s):
                await reached.wait()
        finally:
            self.on_piece = None


def new_session() -> aiohttp.ClientSession:
    """Without a limit on connections, and without reusing them: each client has its own."""
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    return aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None))


def story(index: int, num_tokens: int) -> Body:
    """A stream of exactly so many tokens; even ones are greedy, odd ones seeded."""
    return {
        "model": MODEL,
        "prompt": f"{index + 2} {SUBJECTS[index % len(SUBJECTS)]} went into the woods",
        "max_tokens": num_tokens,
        "temperature": 0.8 if index % 2 else 0.0,
        "seed": index,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def anything(rng: random.Random, max_prompt_tokens: int, max_tokens: int) -> Body:
    """A random valid request; few are long."""
    length = 1 + int(max_prompt_tokens * rng.random() ** 3)
    stream = rng.random() < 0.6
    body: Body = {
        "model": MODEL,
        "prompt": [rng.randrange(100, 40_000) for _ in range(length)] if rng.random() < 0.5 else "The end. " * length,
        "max_tokens": rng.randint(1, max_tokens),
        "temperature": rng.choice([0.0, 0.7, 1.0]),
        "seed": rng.randrange(1000),
        "n": rng.choice([1, 1, 1, 2, 3]),
        "priority": rng.randint(-2, 2),
        "stream": stream,
    }
    if rng.random() < 0.3:
        body["stop"] = rng.sample([" the", ".", "\n", " and", "e"], 2)
    if rng.random() < 0.3:
        body["ignore_eos"] = True
    if stream:
        body["stream_options"] = {"include_usage": True}
    return body
