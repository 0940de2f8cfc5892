"""Tokens to text as they come, and the strings that stop it."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from tokenizers.decoders import DecodeStream

from pdray.outputs import Logprob
from pdray.sampling_params import SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
PROMPT_TAIL = range(4, 24)  # prompt tokens that the decoder sees first, so that a leading space is right


class Piece(NamedTuple):
    """What one token added.

    Attributes:
        text: that may be shown now; text that could become a stop string is held back.
        stop: the stop string that this token completed, if one did; the completion has ended.
    """

    text: str
    stop: str | None


class Detokenizer:
    """Text of one completion. Without a tokenizer every text is empty.

    Stop strings are looked for in the text of output tokens, from min_tokens on. The text ends before the first of
    them (after it with include_stop_str_in_output).
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase | None, prompt_token_ids: list[int], params: SamplingParams
    ) -> None:
        self._params = params
        self._tokenizer = None if tokenizer is None else tokenizer.backend_tokenizer
        self._stream = DecodeStream(skip_special_tokens=params.skip_special_tokens)
        for token_id in self._prompt_tail(prompt_token_ids):
            self._step(token_id)
        self._hold = 0 if params.include_stop_str_in_output else max((len(s) - 1 for s in params.stop), default=0)
        self._num_tokens = 0
        self._num_shown = 0
        self.text = ""  # everything, also what is held back

    def feed(self, token_id: int) -> Piece:
        """The next token."""
        self._num_tokens += 1
        if self._tokenizer is None:
            return Piece("", None)
        added = self._step(token_id)
        before = len(self.text)
        self.text += added
        if added and self._num_tokens > self._params.min_tokens:
            found = [
                (at, stop)
                for stop in self._params.stop
                if (at := self.text.find(stop, max(0, before - len(stop) + 1))) >= 0  # with a new character in it
            ]
            if found:
                at, stop = min(found)
                self.text = self.text[: at + len(stop) if self._params.include_stop_str_in_output else at]
                return Piece(self._show(len(self.text)), stop)
        return Piece(self._show(len(self.text) - self._hold), None)

    def flush(self) -> str:
        """What was held back; the completion has ended otherwise."""
        return self._show(len(self.text))

    def _prompt_tail(self, prompt_token_ids: list[int]) -> list[int]:
        """The end of the prompt, from a whole character on if there is one near."""
        if self._tokenizer is None:
            return []
        for length in PROMPT_TAIL:
            tail = prompt_token_ids[-length:]
            if length >= len(prompt_token_ids) or REPLACEMENT not in self._tokenizer.decode(tail):
                return tail
        return prompt_token_ids[-PROMPT_TAIL.start :]

    def _step(self, token_id: int) -> str:
        assert self._tokenizer is not None
        try:
            return self._stream.step(self._tokenizer, token_id) or ""
        except Exception as error:
            # Broken UTF-8 can decode to less than it did before: start again at this token, as vLLM does.
            if not str(error).startswith("Invalid prefix encountered"):
                raise
            self._stream = DecodeStream(skip_special_tokens=self._params.skip_special_tokens)
            return self._stream.step(self._tokenizer, token_id) or ""

    def _show(self, end: int) -> str:
        shown = self.text[self._num_shown : max(end, self._num_shown)]
        self._num_shown += len(shown)
        return shown


def decode_logprobs(tokenizer: PreTrainedTokenizerBase | None, logprobs: dict[int, Logprob]) -> dict[int, Logprob]:
    """The same logprobs, each with its token's text where there is a tokenizer."""
    if tokenizer is None:
        return logprobs
    return {
        token_id: Logprob(entry.logprob, entry.rank, str(tokenizer.decode([token_id])))
        for token_id, entry in logprobs.items()
    }
