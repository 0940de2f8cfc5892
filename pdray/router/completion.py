"""One completion at the router as its tokens come: its output, and what its consumer has not taken yet."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from pdray.outputs import CompletionOutput, Logprob, SampledToken
from pdray.router.detokenizer import Detokenizer, Piece, decode_logprobs
from pdray.sampling_params import SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(slots=True)
class CompletionDelta:
    """What was added to one completion since the consumer last looked.

    Attributes:
        token_ids: those that have logprobs come with their text, where a stop string may hold it back.
        logprobs, text_offsets: as in CompletionOutput, of token_ids; None if not asked for.
        finish_reason, stop_reason: as in CompletionOutput, on the last delta.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] | None = None
    text_offsets: list[int] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


class _BookedToken(NamedTuple):
    token_id: int
    logprobs: dict[int, Logprob] | None
    text_offset: int


class GrowingCompletion:
    """See the module. Texts are kept in pieces until they are asked for: to add to a string copies all of it.

    Attributes:
        output: everything so far, but for the text, which is there from the end on. Once it is streamed, logprobs and
            text_offsets are in deltas alone: 20 entries for each token of a long stream, kept to its end, are too many.
    """

    def __init__(
        self,
        index: int,
        tokenizer: PreTrainedTokenizerBase | None,
        prompt_token_ids: list[int],
        params: SamplingParams,
    ) -> None:
        self.output = CompletionOutput(index)
        if params.logprobs is not None:
            self.output.logprobs, self.output.text_offsets, self.output.cumulative_logprob = [], [], 0.0
        self._params = params
        self._tokenizer = tokenizer
        self._is_plain = params.logprobs is None and params.max_tokens != 0
        self._detokenizer = Detokenizer(tokenizer, prompt_token_ids, params)
        self._texts: list[str] = []
        self._held: list[_BookedToken] = []  # whose text is held back
        self._is_streamed = False
        self._delta: CompletionDelta | None = None
        self._delta_texts: list[str] = []

    def take(self, token: SampledToken) -> str | None:
        """Book the next token; returns the stop string that it has completed."""
        output, detokenizer = self.output, self._detokenizer
        is_plain = self._is_plain and not self._is_streamed  # nothing goes with the token, which is never held back
        if is_plain and self._tokenizer is None and token.finish_reason is None:
            output.token_ids.append(token.token_id)
            return None
        if self._params.max_tokens == 0:
            self._end_empty()
            return None
        text_offset = detokenizer.num_chars
        is_mark = token.finish_reason == "stop" and not token.is_text
        if is_mark and not self._params.include_stop_str_in_output:
            piece = Piece("", None)  # an end-of-sequence or stop token; it is no text, as in vLLM
        else:
            piece = detokenizer.feed(token.token_id)
        text = piece.text
        if piece.stop is not None:
            output.finish_reason, output.stop_reason = "stop", piece.stop
        elif token.finish_reason is not None:
            text += detokenizer.flush()
            output.finish_reason, output.stop_reason = token.finish_reason, token.stop_reason
        if text:
            self._texts.append(text)
        output.token_ids.append(token.token_id)
        if is_plain:
            if output.finished:
                self.close()
            return piece.stop
        logprobs = None
        if output.cumulative_logprob is not None and token.logprobs:
            logprobs = decode_logprobs(self._tokenizer, token.logprobs)
            output.cumulative_logprob += token.logprobs[token.token_id].logprob
        self._held.append(_BookedToken(token.token_id, logprobs, text_offset))
        if self._is_streamed:
            delta = self._growing_delta()
            delta.finish_reason, delta.stop_reason = output.finish_reason, output.stop_reason
            if text:
                self._delta_texts.append(text)
        self._release()
        if output.finished:
            self.close()
        return piece.stop

    def _end_empty(self) -> None:
        """No token is wanted: the one that a step draws in any case is dropped."""
        self.output.finish_reason = "length"
        if self._is_streamed:
            self._growing_delta().finish_reason = "length"
        self.close()

    def _release(self) -> None:
        """Pass on the tokens whose text is shown, or that no text is held back for."""
        num_chars, num_shown = self._detokenizer.num_chars, self._detokenizer.num_shown
        delta = self._delta
        target = self.output if delta is None else delta
        released = 0
        for token_id, logprobs, text_offset in self._held:
            if self._params.logprobs is not None and num_shown < num_chars and text_offset >= num_shown:
                break
            released += 1
            if delta is not None:
                delta.token_ids.append(token_id)
            if logprobs is not None and target.logprobs is not None and target.text_offsets is not None:
                target.logprobs.append(logprobs)
                target.text_offsets.append(min(text_offset, num_chars))  # a stop string may have cut the text
        del self._held[:released]

    def stream(self) -> None:
        """From now on deltas are made; the first holds everything so far."""
        output = self.output
        self._is_streamed = True
        num_released = len(output.token_ids) - len(self._held)
        if output.token_ids or output.finished:
            self._delta = CompletionDelta(
                output.index,
                "",
                output.token_ids[:num_released],
                output.logprobs,
                output.text_offsets,
                output.finish_reason,
                output.stop_reason,
            )
            self._delta_texts = [*self._texts]
        output.logprobs = output.text_offsets = None

    def take_delta(self) -> CompletionDelta | None:
        """What was added since the last call, if anything was."""
        delta, self._delta = self._delta, None
        if delta is not None:
            delta.text = "".join(self._delta_texts)
            self._delta_texts = []
        return delta

    def close(self) -> None:
        """Nothing more will come."""
        self.output.text = "".join(self._texts)

    def _growing_delta(self) -> CompletionDelta:
        if self._delta is None:
            self._delta = CompletionDelta(self.output.index)
            if self._params.logprobs is not None:
                self._delta.logprobs, self._delta.text_offsets = [], []
        return self._delta
