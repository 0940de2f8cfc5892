"""A request as its consumer has it: deltas as they come, the whole answer, and a way to give it up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from pdray.outputs import RequestOutput
from pdray.router.completion import CompletionDelta
from pdray.router.detokenizer import decode_scores
from pdray.router.request import Request
from pdray.router.tokenization import beside_loop
from pdray.sampling_params import SamplingParams

CHARS_PER_ENTRY = 8  # to name a token takes as long as to tokenize so many


class RoutedRequest:
    """A request that the router has taken. Iterate it for its deltas, or wait(); abort() it if you stop early.

    A slow consumer costs no more than the request's own text: deltas that it has not taken are merged, one for each
    completion. Event loop's thread only.

    Attributes:
        granted: done once the request has its first lease; what the router refuses it with, if it never gets one.
    """

    def __init__(self, request: Request, on_abort: Callable[[Request], None]) -> None:
        self._request = request
        self._on_abort = on_abort
        self._wake = asyncio.Event()
        self._has_ended = asyncio.Event()
        self._error: BaseException | None = None
        self.granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @property
    def request_id(self) -> str:
        return self._request.request_id

    @property
    def params(self) -> SamplingParams:
        return self._request.params

    @property
    def output(self) -> RequestOutput:
        """See Request.output."""
        return self._request.output

    @property
    def ended(self) -> bool:
        return self._request.ended

    async def __aiter__(self) -> AsyncIterator[list[CompletionDelta]]:
        """Deltas as they come, one list for each wake-up. The output has prompt_logprobs before the first.

        Raises:
            WorkerDiedError: the request was lost; nothing more will come.
        """
        completions = self._request.completions
        for completion in completions:
            completion.stream()
        while True:
            await self._wake.wait()
            self._wake.clear()
            ended = self._has_ended.is_set()  # nothing comes after it
            await self._score_prompt()
            deltas = [delta for each in completions if (delta := each.take_delta()) is not None]
            if deltas:
                yield deltas
            if ended:
                if self._error is not None:
                    raise self._error
                return

    async def wait(self) -> RequestOutput:
        """Return at the end, for a consumer that wants no deltas and need not be woken for them.

        Raises:
            WorkerDiedError: as of the iteration.
        """
        await self._has_ended.wait()
        if self._error is not None:
            raise self._error
        await self._score_prompt()
        return self.output

    async def _score_prompt(self) -> None:
        """Put the prompt's log-probabilities into the output once they are there; long ones beside the event loop."""
        scores, output = self._request.prompt_scores, self.output
        if scores is not None and output.prompt_logprobs is None:
            work = len(output.prompt_token_ids) * (1 + scores.num_top) * CHARS_PER_ENTRY
            output.prompt_logprobs = await beside_loop(work, lambda: decode_scores(self._request.tokenizer, scores))

    def abort(self) -> None:
        """Give the request up, in whatever state it is. Idempotent; nothing happens after its end."""
        if not self.ended:
            self._on_abort(self._request)

    # the router's side

    def begin(self) -> None:
        """It has its lease."""
        if not self.granted.done():
            self.granted.set_result(None)

    def wake(self) -> None:
        """Its request has new tokens."""
        self._wake.set()

    def end(self, error: BaseException | None = None) -> None:
        """Its request has ended."""
        self._error = error
        if not self.granted.done():
            if error is None:
                self.granted.cancel()
            else:
                self.granted.set_exception(error)
        self._wake.set()
        self._has_ended.set()
