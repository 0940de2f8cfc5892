"""Tokens to text as they come, and the strings that stop it."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from pdray.models.vocabulary import vocabulary_of
from pdray.outputs import Logprob
from pdray.prompt_scores import PromptScores
from pdray.router.text_stream import TextStream
from pdray.sampling_params import SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Piece(NamedTuple):
    """What one token added.

    Attributes:
        text: that may be shown now; text that could become a stop string is held back.
        stop: the stop string that this token completed, if one did; the completion has ended.
    """

    text: str
    stop: str | None


class Detokenizer:
    """Text of one completion; see TextStream. Without a tokenizer every text is empty.

    Stop strings are looked for in the text of output tokens, from min_tokens on. The text ends before the first of
    them (after it with include_stop_str_in_output). Of the text, only as much is kept as a stop string may begin in.

    Attributes:
        num_chars: length of the text so far, with what is held back. The next token's text begins there.
        num_shown: length of what feed() and flush() have returned.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase | None, prompt_token_ids: list[int], params: SamplingParams
    ) -> None:
        self._params = params
        self._stream = None
        if tokenizer is not None:
            self._stream = TextStream(tokenizer, prompt_token_ids, skip_special_tokens=params.skip_special_tokens)
        self._reach = max((len(stop) - 1 for stop in params.stop), default=0)
        self._hold = 0 if params.include_stop_str_in_output else self._reach
        self._num_tokens = 0
        self._tail = ""  # the text's last characters, as many as a stop string may begin in
        self.num_chars = 0
        self.num_shown = 0

    def feed(self, token_id: int) -> Piece:
        """The next token."""
        self._num_tokens += 1
        added = "" if self._stream is None else self._stream.feed(token_id)
        if not added:
            return Piece("", None)
        if not self._params.stop:
            self.num_chars = self.num_shown = self.num_chars + len(added)
            return Piece(added, None)
        text, before = self._tail + added, len(self._tail)
        self.num_chars += len(added)
        stop = None
        if self._num_tokens > self._params.min_tokens:
            found = [
                (at, each)
                for each in self._params.stop
                if (at := text.find(each, max(0, before - len(each) + 1))) >= 0  # with a new character in it
            ]
            if found:
                at, stop = min(found)
                end = at + len(stop) if self._params.include_stop_str_in_output else at
                self.num_chars -= len(text) - end
                text = text[:end]
        self._tail = text
        shown = self._show(0 if stop is not None else self._hold)
        self._tail = text[max(0, len(text) - self._reach) :]
        return Piece(shown, stop)

    def flush(self) -> str:
        """What was held back; the completion has ended otherwise."""
        return self._show(0)

    def _show(self, hold: int) -> str:
        """The text's end that was not shown, but for its last `hold` characters."""
        num_new = max(0, self.num_chars - hold - self.num_shown)
        end = len(self._tail) - (self.num_chars - self.num_shown - num_new)
        self.num_shown += num_new
        return self._tail[end - num_new : end]


def decode_logprobs(tokenizer: PreTrainedTokenizerBase | None, logprobs: dict[int, Logprob]) -> dict[int, Logprob]:
    """The same logprobs, each with its token's piece of the vocabulary where there is a tokenizer."""
    if tokenizer is None:
        return logprobs
    vocabulary = vocabulary_of(tokenizer)
    return {
        token_id: Logprob(entry.logprob, entry.rank, vocabulary.shown(token_id), vocabulary.piece(token_id))
        for token_id, entry in logprobs.items()
    }


def decode_scores(tokenizer: PreTrainedTokenizerBase | None, scores: PromptScores) -> list[dict[int, Logprob] | None]:
    """RequestOutput.prompt_logprobs."""
    return [None, *(decode_logprobs(tokenizer, entry) for entry in scores.unpack())]
