"""A tokenizer as a grammar sees it: the bytes that each token stands for."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import llguidance

from pdray.config import Config
from pdray.errors import InvalidRequestError
from pdray.models.tokenizer import load_tokenizer
from pdray.models.vocabulary import vocabulary_of
from pdray.structured_outputs import FIELD

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# Tokens that match one of these are allowed all at once where anything that matches it is: within a string, by how many
# characters it may still have. Others are looked at one by one. The library's own list goes from 10 to 30.
SLICES = [
    r"[\x20\x0A\x0D\x09]+",
    *(rf'[^"\\\x00-\x1F\x7F]{{1,{most}}}' for most in (1, 2, 4, 7, 10, 15, 20, 30)),
    r'[^"\\\x00-\x1F\x7F]+',
]
MAX_ENCODED_CHARS = 256


class TokenPieces(NamedTuple):
    """Attributes:
    pieces: of each id of the vocabulary within a text; empty for ids that stand for nothing.
    special: ids that are no text, whatever their piece; no grammar allows them.
    encode: the model's own way to write a text; None: the longest pieces first.
    """

    pieces: list[bytes]
    special: frozenset[int]
    encode: Callable[[str], list[int]] | None = None

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, vocab_size: int | None = None) -> TokenPieces:
        """Args:
        vocab_size: the model's, where it is not the tokenizer's.
        """
        vocabulary, backend = vocabulary_of(tokenizer), tokenizer.backend_tokenizer
        ids = range(len(tokenizer) if vocab_size is None else vocab_size)
        pieces = [vocabulary.piece(i) for i in ids]
        special = frozenset(i for i in ids if not vocabulary.is_text(i, skip_special_tokens=True))
        return cls(pieces, special, lambda text: list(backend.encode(text, add_special_tokens=False).ids))

    def trie(self) -> llguidance.LLTokenizer:
        """The trie that masks are computed with. Its last id, vocab_size, stands for the end of the text."""
        wrapped = _Wrapped(self)
        wrapped.trie = llguidance.LLTokenizer(wrapped, slices=SLICES)  # type: ignore[arg-type]
        return wrapped.trie


def load_pieces(config: Config, vocab_size: int) -> TokenPieces:
    """Of the configured tokenizer.

    Raises:
        InvalidRequestError: there is none (skip_tokenizer_init). ModelLoadError: it cannot be read.
    """
    tokenizer = load_tokenizer(config)
    if tokenizer is None:
        raise InvalidRequestError(
            f"{FIELD} needs a tokenizer, and this server has none (skip_tokenizer_init); leave it out", FIELD
        )
    return TokenPieces.of(tokenizer, vocab_size)


class _Wrapped:
    """What LLTokenizer asks for. Where a grammar leaves one text only, the tokens are those that encode() gives."""

    is_tokenizer_wrapper = True
    bos_token_id = None
    trie: llguidance.LLTokenizer

    def __init__(self, tokens: TokenPieces) -> None:
        self._tokens = tokens
        self.eos_token_id = len(tokens.pieces)
        self.tokens = [*tokens.pieces, b"<end>"]
        # An id that stands for nothing is in no trie. As a special token it would be, one more with the same bytes.
        self.special_token_ids = [*sorted(i for i in tokens.special if tokens.pieces[i]), self.eos_token_id]

    def __call__(self, text: str | bytes) -> list[int]:
        text = text if isinstance(text, str) else text.decode(errors="replace")
        text = text[:MAX_ENCODED_CHARS]  # each step asks for the tokens of all that is left, and takes the first one
        pieces, encode = self._tokens.pieces, self._tokens.encode
        if encode is not None:
            ids = encode(text)
            # a text may look like a special token; it is written in others
            is_text = all(i < len(pieces) and i not in self._tokens.special for i in ids)
            if is_text and b"".join(pieces[i] for i in ids) == text.encode():
                return ids
        return list(self.trie.greedy_tokenize(text))
