"""One request at the router: its output as it grows, its timings, and its consumer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pdray.cluster.losses import Losses
from pdray.cluster.request_tracker import RequestTracker
from pdray.outputs import CompletionOutput, Logprob, RequestOutput, SampledToken
from pdray.router.detokenizer import Detokenizer, Piece, decode_logprobs
from pdray.sampling_params import SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(slots=True)
class CompletionDelta:
    """What was added to one completion since the consumer last looked.

    Attributes:
        logprobs: one dict per new token; None if not asked for.
        finish_reason, stop_reason: as in CompletionOutput, on the last delta.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


class RoutedRequest:
    """A request that the router has taken. Iterate it for its deltas, or wait(); abort() it if you stop early.

    A slow consumer costs no more than the request's own text: deltas that it has not taken are merged, one for each
    completion. Event loop's thread only.

    Attributes:
        output: everything so far; complete once the iteration has ended, but for logprobs: who iterates has them in
            deltas alone.
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
        self.output = RequestOutput(
            request_id, prompt, prompt_token_ids, [CompletionOutput(index) for index in range(params.n)]
        )
        if params.logprobs is not None:
            for completion in self.output.outputs:
                completion.logprobs, completion.cumulative_logprob = [], 0.0
        self._tokenizer = tokenizer
        self._detokenizers = [Detokenizer(tokenizer, prompt_token_ids, params) for _ in range(params.n)]
        self._on_abort = on_abort
        self._pending: dict[int, CompletionDelta] = {}
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
        for completion in self.output.outputs:  # 20 for each token of a long stream, kept to its end, fill a router
            completion.logprobs = None
        while True:
            await self._wake.wait()
            self._wake.clear()
            deltas, self._pending = list(self._pending.values()), {}
            ended = self.ended
            if deltas:
                yield deltas
            if ended and not self._pending:
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
            completion = self.output.outputs[token.index]
            if completion.finished:
                continue  # tokens of the same message, after the one that completed a stop string
            delta = self._delta(token.index)
            completion.token_ids.append(token.token_id)
            delta.token_ids.append(token.token_id)
            if delta.logprobs is not None and completion.cumulative_logprob is not None and token.logprobs:
                logprobs = decode_logprobs(self._tokenizer, token.logprobs)
                delta.logprobs.append(logprobs)
                if completion.logprobs is not None:
                    completion.logprobs.append(logprobs)
                completion.cumulative_logprob += token.logprobs[token.token_id].logprob
            detokenizer = self._detokenizers[token.index]
            if token.finish_reason == "stop" and not self.params.include_stop_str_in_output:
                piece = Piece("", None)  # an end-of-sequence or stop token; it is no text, as in vLLM
            else:
                piece = detokenizer.feed(token.token_id)
            text = piece.text
            if piece.stop is not None:
                if token.finish_reason is None:
                    self.outruns.add(token.index)
                self.tracker.finish(token.index)
                completion.finish_reason, completion.stop_reason = "stop", piece.stop
            elif token.finish_reason is not None:
                text += detokenizer.flush()
                completion.finish_reason, completion.stop_reason = token.finish_reason, token.stop_reason
            completion.text += text
            delta.text += text
            delta.finish_reason, delta.stop_reason = completion.finish_reason, completion.stop_reason
        self._note_times(tokens)
        self._wake.set()

    def end(self, error: BaseException | None = None) -> None:
        """Nothing more will come."""
        self.ended, self._error = True, error
        self.output.finished = error is None
        self.output.timings.e2e = time.monotonic() - self.arrival
        if not self.granted.done():
            if error is None:
                self.granted.cancel()
            else:
                self.granted.set_exception(error)
        self._wake.set()
        self._has_ended.set()

    def _delta(self, index: int) -> CompletionDelta:
        delta = self._pending.get(index)
        if delta is None:
            delta = self._pending[index] = CompletionDelta(index)
            delta.logprobs = None if self.params.logprobs is None else []
        return delta

    def _note_times(self, tokens: list[SampledToken]) -> None:
        now, timings = time.monotonic(), self.output.timings
        if self.first_token_at is None:
            self.first_token_at = now
            timings.ttft = now - self.arrival
        elif timings.first_gap is None and any(token.position == 1 for token in tokens):
            timings.first_gap = now - self.first_token_at
        self.last_token_at = now
