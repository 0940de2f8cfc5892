"""From a checked body to its answer: submit, collect or stream, and always let go of what was submitted."""

from __future__ import annotations

import asyncio
import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Iterable, Sequence
from typing import Any, Protocol

from fastapi import Request
from fastapi.responses import Response

from pdray.errors import InvalidRequestError
from pdray.outputs import CompletionOutput, RequestOutput
from pdray.router.completion import CompletionDelta
from pdray.router.routed import CHARS_PER_ENTRY, RoutedRequest
from pdray.router.tokenization import beside_loop
from pdray.sampling_params import SamplingParams
from pdray.serve.connection import EventStream, unless_gone
from pdray.serve.errors import to_api_error
from pdray.serve.protocol import GenerationBody
from pdray.serve.responses import SSE_DONE, encode_json, envelope, sse, timings_ms, usage

CONTROLS = ("allowed_token_ids", "bad_words", "logit_bias")


class Submits(Protocol):
    """What the API needs of a Router."""

    @property
    def max_model_len(self) -> int | None: ...

    async def tokenize(self, prompts: Sequence[str | list[int]], keep_last: int | None = None) -> list[list[int]]: ...

    async def submit(
        self,
        prompt: list[int],
        params: SamplingParams,
        *,
        request_id: str,
        priority: int = 0,
        default_max_tokens: int | None = None,
        text: str | None = None,
        arrival: float | None = None,
    ) -> RoutedRequest: ...


class Generation(ABC):
    """One HTTP request's generation. Subclasses know the endpoint's shapes.

    Attributes:
        object_name, chunk_object_name: the "object" of the answer, and of its chunks.
        prompt_field: of the body, which the prompt is made of.
    """

    object_name: str
    chunk_object_name: str
    prompt_field: str

    def __init__(
        self,
        body: GenerationBody,
        prompts: Sequence[str | list[int]],
        params: SamplingParams,
        request_id: str,
        model: str,
        default_max_tokens: int | None,
    ) -> None:
        self.body = body
        self.prompts = prompts
        self.params = params
        self.request_id = request_id
        self.model = model
        self.default_max_tokens = default_max_tokens
        self.created = int(time.time())

    @abstractmethod
    def choice(self, index: int, output: RequestOutput, completion: CompletionOutput) -> dict[str, Any]:
        """A completion of a prompt's output, as the choice number index of the whole answer."""

    @abstractmethod
    def delta_choices(self, index: int, delta: CompletionDelta) -> list[dict[str, Any]]:
        """A delta as the choices of chunks, one chunk each."""

    def first_choices(self, index: int, output: RequestOutput) -> list[dict[str, Any]]:
        """Choices of chunks that come before any token."""
        return []

    def prompt_fields(self, output: RequestOutput) -> dict[str, Any]:
        """What an answer, and each of the chunks before any token, says of a prompt."""
        return {}

    async def respond(self, http: Request, router: Submits) -> Response:
        """The HTTP answer. Admission is over before a streaming one begins: what is raised here has a status.

        Raises:
            PdrayError: see Router.submit and RoutedRequest. ClientGone: it did not wait for the answer.
        """
        admitted: dict[int, RoutedRequest] = {}
        streaming = False
        try:
            await unless_gone(http.receive, self._submit(router, admitted))
            requests = [admitted[index] for index in range(len(self.prompts))]
            if self.body.stream:
                streaming = True
                return EventStream(self.stream(requests), lambda: _abort(requests))
            outputs = await unless_gone(http.receive, asyncio.gather(*(request.wait() for request in requests)))
        except InvalidRequestError as error:
            error.param = self._field_of(error.param)
            raise
        finally:
            if not streaming:
                _abort(admitted.values())
        num_scored = 0 if self.params.prompt_logprobs is None else sum(len(each.prompt_token_ids) for each in outputs)
        work = num_scored * self.params.n * CHARS_PER_ENTRY * (1 + (self.params.prompt_logprobs or 0))
        answer = await beside_loop(work, lambda: encode_json(self.answer(outputs)))
        return Response(answer, media_type="application/json")

    def _field_of(self, param: str | None) -> str | None:
        """The body's field that a parameter was made of."""
        body = self.body
        if param == "prompt":
            return self.prompt_field
        if param != "structured_outputs" or body.structured_outputs is not None:
            return param
        if self.params.structured_outputs is None:  # other controls have left no token
            return next((name for name in CONTROLS if getattr(self.params, name)), None)
        return "tools" if body.response_format is None or body.response_format.type == "text" else "response_format"

    def answer(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        """The whole answer."""
        choices = [
            self.choice(p * self.params.n + completion.index, output, completion)
            for p, output in enumerate(outputs)
            for completion in output.outputs
        ]
        answer = envelope(self.object_name, self.request_id, self.created, self.model)(choices)
        answer |= self.prompt_fields(outputs[0])
        return answer | {"usage": usage(outputs), "timings": timings_ms(outputs[0].timings)}

    async def _submit(self, router: Submits, admitted: dict[int, RoutedRequest]) -> None:
        """Submit all prompts at once. Whatever happens, `admitted` holds those that the router has taken."""
        arrival = time.monotonic()

        num_kept = self._num_kept(router.max_model_len)

        async def one(index: int, prompt_token_ids: list[int]) -> None:
            prompt = self.prompts[index]
            is_whole = num_kept is None or len(prompt_token_ids) < num_kept
            admitted[index] = await router.submit(
                prompt_token_ids,
                self.params,
                request_id=self.request_id + (f"-{index}" if len(self.prompts) > 1 else ""),
                priority=self.body.priority or 0,
                text=prompt if isinstance(prompt, str) and is_whole else None,
                arrival=arrival,
                default_max_tokens=self.default_max_tokens,
            )

        prompts = await router.tokenize(self.prompts, num_kept)
        tasks = [asyncio.ensure_future(one(index, ids)) for index, ids in enumerate(prompts)]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _num_kept(self, max_model_len: int | None) -> int | None:
        """Tokens at a prompt's end that truncate_prompt_tokens leaves; None without it."""
        wanted = self.body.truncate_prompt_tokens
        if wanted is None or max_model_len is None:  # nobody is there, as tokenize() will say
            return None
        wanted_tokens = self.default_max_tokens if self.params.max_tokens is None else self.params.max_tokens
        room = max_model_len - (wanted_tokens or 1)
        if wanted >= max_model_len or room < 1:
            raise InvalidRequestError(
                f"truncate_prompt_tokens is {wanted} and max_tokens {self.params.max_tokens}, which leaves no room in "
                f"max_model_len ({max_model_len}); lower them",
                "truncate_prompt_tokens",
            )
        return room if wanted == -1 else wanted

    async def stream(self, requests: list[RoutedRequest]) -> AsyncGenerator[bytes, None]:
        """Server-sent events; an error after the start is an event, for the status has been sent."""
        wrap = envelope(self.chunk_object_name, self.request_id, self.created, self.model)
        options = self.body.stream_options
        with_usage = options is not None and bool(options.include_usage)
        outputs = [request.output for request in requests]

        def chunk(choices: list[dict[str, Any]], **fields: Any) -> bytes:
            value = wrap(choices) | fields
            if with_usage and choices:
                continuous = options is not None and options.continuous_usage_stats
                value["usage"] = usage(outputs) if continuous else None
            return sse(value)

        def first_chunks(p: int) -> list[bytes]:
            fields = self.prompt_fields(outputs[p])
            indices = range(p * self.params.n, (p + 1) * self.params.n)
            return [chunk([choice], **fields) for i in indices for choice in self.first_choices(i, outputs[p])]

        try:
            silent = set(range(len(outputs)))
            async with contextlib.aclosing(merged(requests)) as arriving:
                async for p, deltas in arriving:
                    if p in silent:  # not before: clients take the first chunk for the first token
                        silent.remove(p)
                        for first in first_chunks(p):
                            yield first
                    for delta in deltas:
                        for choice in self.delta_choices(p * self.params.n + delta.index, delta):
                            yield chunk([choice])
            for p in sorted(silent):
                for first in first_chunks(p):
                    yield first
            if with_usage:
                yield sse(wrap([]) | {"usage": usage(outputs), "timings": timings_ms(outputs[0].timings)})
            yield SSE_DONE
        except Exception as error:
            if isinstance(error, InvalidRequestError):
                error.param = self._field_of(error.param)
            yield sse(to_api_error(error).body)


def _abort(requests: Iterable[RoutedRequest]) -> None:
    for request in requests:
        request.abort()


async def merged(requests: Sequence[RoutedRequest]) -> AsyncGenerator[tuple[int, list[CompletionDelta]], None]:
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
