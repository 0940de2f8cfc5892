"""One request at the router: its output as it grows, its timings, and its consumer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING

from pdray.control.losses import Losses
from pdray.control.request_tracker import RequestTracker
from pdray.outputs import RequestOutput, SampledToken
from pdray.router.completion import CompletionDelta, GrowingCompletion
from pdray.sampling_params import SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class RoutedRequest:
    """A request that the router has taken. Iterate it for its deltas, or wait(); abort() it if you stop early.

    A slow consumer costs no more than the request's own text: deltas that it has not taken are merged, one for each
    completion. Event loop's thread only.

    Attributes:
        output: everything so far, but for the text of completions that go on; complete at the end, but for logprobs:
            who iterates has them in deltas alone.
    """

    def __init__(
        self,
        request_id: str,
        prompt: str | None,
        prompt_token_ids: list[int],
        params: SamplingParams,
        priority: int,
        tokenizer: PreTrainedTokenizerBase | None,
        arrival: float,
        on_abort: Callable[[RoutedRequest], None],
    ) -> None:
        self.request_id = request_id
        self.params = params
        self.priority = priority
        self.tracker = RequestTracker(request_id, params.n)
        self._completions = [GrowingCompletion(i, tokenizer, prompt_token_ids, params) for i in range(params.n)]
        self.output = RequestOutput(request_id, prompt, prompt_token_ids, [each.output for each in self._completions])
        self._on_abort = on_abort
        self._wake = asyncio.Event()
        self._has_ended = asyncio.Event()
        self._error: BaseException | None = None
        self.ended = False

        # the router's own notes
        self.arrival = arrival
        self.granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.outruns: set[int] = set()  # completions ended by a stop string that their worker does not know of
        self.losses = Losses()
        self.first_token_at: float | None = None
        self.last_token_at = 0.0

    async def __aiter__(self) -> AsyncIterator[list[CompletionDelta]]:
        """Deltas as they come, one list for each wake-up.

        Raises:
            WorkerDiedError: the request was lost; nothing more will come.
        """
        for completion in self._completions:
            completion.stream()
        while True:
            await self._wake.wait()
            self._wake.clear()
            ended = self.ended  # nothing comes after it
            deltas = [delta for each in self._completions if (delta := each.take_delta()) is not None]
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
        return self.output

    def abort(self) -> None:
        """Give the request up, in whatever state it is. Idempotent; nothing happens after its end."""
        if not self.ended:
            self._on_abort(self)

    # the router's side

    def take(self, tokens: list[SampledToken]) -> None:
        """Book fresh tokens."""
        for token in tokens:
            completion = self._completions[token.index]
            if completion.output.finished:
                continue  # tokens of the same message, after the one that completed a stop string
            if completion.take(token) is not None:
                if token.finish_reason is None:
                    self.outruns.add(token.index)
                self.tracker.finish(token.index)
        self._note_times(tokens)
        self._wake.set()

    def end(self, error: BaseException | None = None) -> None:
        """Nothing more will come."""
        self.ended, self._error = True, error
        for completion in self._completions:
            completion.close()
        self.output.finished = error is None
        self.output.timings.e2e = time.monotonic() - self.arrival
        if not self.granted.done():
            if error is None:
                self.granted.cancel()
            else:
                self.granted.set_exception(error)
        self._wake.set()
        self._has_ended.set()

    def _note_times(self, tokens: list[SampledToken]) -> None:
        now, timings = time.monotonic(), self.output.timings
        if self.first_token_at is None:
            self.first_token_at = now
            timings.ttft = now - self.arrival
        elif timings.first_gap is None and any(token.position == 1 for token in tokens):
            timings.first_gap = now - self.first_token_at
        self.last_token_at = now
