"""From a checked body to its answer: submit, collect or stream, and always let go of what was submitted."""

from __future__ import annotations

import asyncio
import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Coroutine, Sequence
from typing import Any, Protocol, TypeVar

from fastapi import Request
from fastapi.responses import Response, StreamingResponse

from pdray.outputs import CompletionOutput
from pdray.router.request import CompletionDelta, RoutedRequest
from pdray.sampling_params import SamplingParams
from pdray.serve.errors import to_api_error
from pdray.serve.protocol import GenerationBody
from pdray.serve.responses import SSE_DONE, encode_json, envelope, sse, timings_ms, usage

T = TypeVar("T")


class Submits(Protocol):
    """What the API needs of a Router."""

    async def submit(
        self, prompt: str | list[int], params: SamplingParams, *, request_id: str, priority: int = 0
    ) -> RoutedRequest: ...


class ClientGone(Exception):
    """The client has closed its connection; nobody reads the answer."""


class Generation(ABC):
    """One HTTP request's generation. Subclasses know the endpoint's shapes.

    Attributes:
        object_name, chunk_object_name: the "object" of the answer, and of its chunks.
    """

    object_name: str
    chunk_object_name: str

    def __init__(
        self,
        body: GenerationBody,
        prompts: Sequence[str | list[int]],
        params: SamplingParams,
        request_id: str,
        model: str,
    ) -> None:
        self.body = body
        self.prompts = prompts
        self.params = params
        self.request_id = request_id
        self.model = model
        self.created = int(time.time())

    @abstractmethod
    def choice(self, index: int, prompt_index: int, completion: CompletionOutput) -> dict[str, Any]:
        """A choice of the whole answer."""

    @abstractmethod
    def delta_choices(self, index: int, prompt_index: int, delta: CompletionDelta) -> list[dict[str, Any]]:
        """A delta as the choices of chunks, one chunk each."""

    def first_choices(self, index: int, prompt_index: int) -> list[dict[str, Any]]:
        """Choices of chunks that come before any token."""
        return []

    async def respond(self, http: Request, router: Submits) -> Response:
        """The HTTP answer. Admission is over before a streaming one begins: what is raised here has a status."""
        requests = await _unless_gone(http, self._submit(router))
        if self.body.stream:
            return StreamingResponse(
                self._stream(requests), media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
            )
        try:
            await _unless_gone(http, _drain(requests))
        finally:
            _abort(requests)
        outputs = [request.output for request in requests]
        choices = [
            self.choice(p * self.params.n + completion.index, p, completion)
            for p, output in enumerate(outputs)
            for completion in output.outputs
        ]
        answer = envelope(self.object_name, self.request_id, self.created, self.model)(choices)
        answer |= {"usage": usage(outputs), "timings": timings_ms(outputs[0].timings)}
        return Response(encode_json(answer), media_type="application/json")

    async def _submit(self, router: Submits) -> list[RoutedRequest]:
        """All prompts or none."""

        async def one(index: int, prompt: str | list[int]) -> RoutedRequest:
            suffix = f"-{index}" if len(self.prompts) > 1 else ""
            return await router.submit(
                prompt, self.params, request_id=self.request_id + suffix, priority=self.body.priority
            )

        tasks = [asyncio.ensure_future(one(index, prompt)) for index, prompt in enumerate(self.prompts)]
        try:
            return list(await asyncio.gather(*tasks))
        except BaseException:
            for task in tasks:
                task.cancel()
            settled = await asyncio.gather(*tasks, return_exceptions=True)
            _abort([result for result in settled if isinstance(result, RoutedRequest)])
            raise

    async def _stream(self, requests: list[RoutedRequest]) -> AsyncIterator[bytes]:
        """Server-sent events; an error after the start is an event, for the status has been sent."""
        wrap = envelope(self.chunk_object_name, self.request_id, self.created, self.model)
        options = self.body.stream_options
        with_usage = options is not None and options.include_usage
        outputs = [request.output for request in requests]

        def chunk(choices: list[dict[str, Any]]) -> bytes:
            value = wrap(choices)
            if with_usage and choices:
                continuous = options is not None and options.continuous_usage_stats
                value["usage"] = usage(outputs) if continuous else None
            return sse(value)

        try:
            for p in range(len(requests)):
                for i in range(self.params.n):
                    for choice in self.first_choices(p * self.params.n + i, p):
                        yield chunk([choice])
            async for p, deltas in _merged(requests):
                for delta in deltas:
                    for choice in self.delta_choices(p * self.params.n + delta.index, p, delta):
                        yield chunk([choice])
            if with_usage:
                yield sse(wrap([]) | {"usage": usage(outputs), "timings": timings_ms(outputs[0].timings)})
            yield SSE_DONE
        except Exception as error:
            yield sse(to_api_error(error).body)
        finally:
            _abort(requests)


def _abort(requests: Sequence[RoutedRequest]) -> None:
    for request in requests:
        request.abort()


async def _drain(requests: Sequence[RoutedRequest]) -> None:
    async for _ in _merged(requests):
        pass


async def _merged(requests: Sequence[RoutedRequest]) -> AsyncIterator[tuple[int, list[CompletionDelta]]]:
    """Deltas of all requests as they come, each with its request's index."""
    if len(requests) == 1:
        async for deltas in requests[0]:
            yield 0, deltas
        return
    arrived: asyncio.Queue[tuple[int, list[CompletionDelta]] | BaseException | None] = asyncio.Queue(len(requests))

    async def pump(index: int) -> None:
        try:
            async for deltas in requests[index]:
                await arrived.put((index, deltas))
            await arrived.put(None)
        except Exception as error:
            await arrived.put(error)

    tasks = [asyncio.ensure_future(pump(index)) for index in range(len(requests))]
    try:
        running = len(requests)
        while running:
            item = await arrived.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                running -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()


async def _unless_gone(http: Request, work: Coroutine[Any, Any, T]) -> T:
    """The work's result, unless the client goes away first: then the work is cancelled.

    Raises:
        ClientGone: it went away.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_wait_gone(http))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        for pending in (task, gone):
            if not pending.done():
                pending.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await pending


async def _wait_gone(http: Request) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass
