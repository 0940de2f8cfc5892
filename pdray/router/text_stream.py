"""Token ids to characters as they come, by their pieces' bytes."""

from __future__ import annotations

import codecs
from typing import TYPE_CHECKING

from pdray.models.vocabulary import REPLACE_EACH_BYTE, vocabulary_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
MAX_OPEN_BYTES = 3  # of a character that is not whole


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return REPLACEMENT * (error.end - error.start), error.end


codecs.register_error(REPLACE_EACH_BYTE, _replace_each_byte)


class TextStream:
    """The text of tokens that follow a prompt. Each token costs its own length, whatever came before.

    A character is returned with the token that completes it; one that is never completed is no text. Bytes that are no
    UTF-8 become U+FFFD as in the tokenizer's own decoding: one for each broken sequence (byte-level), or one for each
    byte (byte fallback). The latter's decoding also gives up good characters of a run of byte tokens that has a bad
    one; they have been shown by then, and stay.

    The prompt's text is not repeated. Where it ends within a character, the output begins with that character if its
    tokens complete it; if not, the broken bytes are the prompt's.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, prompt_token_ids: list[int], *, skip_special_tokens: bool
    ) -> None:
        self._vocabulary = vocabulary_of(tokenizer)
        self._skip_special_tokens = skip_special_tokens
        self._at_start = not any(self._is_text(token_id) for token_id in prompt_token_ids)
        self._num_to_strip = self._vocabulary.strip.times if self._at_start else 0
        self._decoder = codecs.getincrementaldecoder("utf-8")(self._vocabulary.errors)
        self._decoder.decode(self._last_bytes(prompt_token_ids))
        self._open = self._decoder.getstate()[0]  # bytes since the prompt's unfinished character, until it is decided
        self._num_broken = len(self._open.decode("utf-8", self._vocabulary.errors))

    def feed(self, token_id: int) -> str:
        """The characters that the token completes."""
        if not self._is_text(token_id):
            return ""
        vocabulary = self._vocabulary
        piece = vocabulary.first_piece(token_id) if self._at_start else vocabulary.piece(token_id)
        self._at_start = False
        text = self._decoder.decode(piece)
        if self._open:
            self._open += piece
            if text:
                is_whole = self._open.startswith(text[0].encode())
                text, self._open = text if is_whole else text[self._num_broken :], b""
        while self._num_to_strip and text:
            is_stripped = text[0] == vocabulary.strip.content
            text, self._num_to_strip = (text[1:], self._num_to_strip - 1) if is_stripped else (text, 0)
        return text

    def _is_text(self, token_id: int) -> bool:
        return self._vocabulary.is_text(token_id, skip_special_tokens=self._skip_special_tokens)

    def _last_bytes(self, token_ids: list[int]) -> bytes:
        """Enough of the text's end to hold an unfinished character."""
        tail = b""
        for token_id in reversed(token_ids):
            if len(tail) >= MAX_OPEN_BYTES:
                break
            if self._is_text(token_id):
                tail = self._vocabulary.piece(token_id) + tail
        return tail
