"""A compiled grammar, and how far one output has come in it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import llguidance
import numpy as np

from pdray.engine.grammar.spelling import PLAIN, Spelling

Words = np.ndarray[Any, np.dtype[np.int32]]  # one bit a token, 32 a word, the lowest first


class GrammarError(Exception):
    """An output cannot go on under its grammar."""


def num_words(vocab_size: int) -> int:
    """Words that hold a bit for each token."""
    return -(-vocab_size // 32)


class Grammar(NamedTuple):
    """What a compiler makes, for one request. Its matchers share what they have found out about it.

    Attributes:
        start: a matcher that has taken nothing, and never does.
        special: see TokenPieces.
        spelling: of JSON; None for other texts.
    """

    start: llguidance.LLMatcher
    vocab_size: int
    special: frozenset[int]
    spelling: Spelling | None = None

    def matcher(self, token_ids: Iterable[int] = ()) -> GrammarMatcher:
        """One that has taken these tokens.

        Raises:
            GrammarError: they do not begin any text of the grammar.
        """
        matcher = GrammarMatcher(self.start.deep_copy(), self.spelling)
        for token_id in token_ids:
            matcher.take(token_id)
        return matcher

    def empty_mask(self) -> Words:
        """Room for GrammarMatcher.fill()."""
        return np.zeros(num_words(self.vocab_size + 1), dtype=np.int32)

    def has_text(self) -> bool:
        """Whether a first token is allowed."""
        words = self.empty_mask()
        self.matcher().fill(words)
        words[self.vocab_size // 32] &= (1 << self.vocab_size % 32) - 1  # the end's bit, and those after it
        return bool(words.any())


class GrammarMatcher:
    """One output's place in its grammar. For one thread at a time."""

    def __init__(self, matcher: llguidance.LLMatcher, spelling: Spelling | None) -> None:
        self._matcher = matcher
        self._spelling = spelling
        self._state = PLAIN

    def take(self, token_id: int) -> None:
        """The output has this token now.

        Raises:
            GrammarError: the grammar does not allow it, or has become too expensive.
        """
        if not self._matcher.consume_token(token_id):
            raise GrammarError(self.error)
        if self._spelling is not None:
            state = self._spelling.after(self._state, token_id)
            if state is None:
                raise GrammarError("a character of a JSON string is spelled in an unusual way")
            self._state = state

    def narrow(self, words: Words) -> None:
        """Take away what fill_all() has left in though it does not keep to the spelling."""
        if self._spelling is not None:
            words &= self._spelling.allowed[self._state][: len(words)]

    @property
    def ended(self) -> bool:
        """Whether the text is complete, and nothing can follow it."""
        return bool(self._matcher.is_stopped())

    @property
    def error(self) -> str:
        """First line of why it cannot go on; empty while it can."""
        return str(self._matcher.get_error()).partition("\n")[0]

    def fill(self, words: Words) -> None:
        """Set the bits of the tokens that may come next, and no others.

        Args:
            words: [num_words(vocab_size + 1)]; bit vocab_size says whether the text may end here.

        Raises:
            GrammarError: as of take().
        """
        fill_all([self], words[None], None)
        if self.error:
            raise GrammarError(self.error)
        self.narrow(words)


def fill_all(
    matchers: Sequence[GrammarMatcher], words: Words, executor: llguidance.LLExecutor | None, rows: Sequence[int] = (0,)
) -> None:
    """GrammarMatcher.fill() of each, but for narrow(), into the row of words given for it. Whose ``error`` is set then,
    has no mask.

    Args:
        executor: threads to spread them over; None: the caller's own. Others run Python meanwhile.
    """
    assert words.flags.c_contiguous and words.dtype == np.int32
    address, size = words.ctypes.data, words.shape[1] * 4
    inner = [each._matcher for each in matchers]
    if executor is not None and len(inner) > 1:
        executor.unsafe_compute_mask_ptr(list(zip(inner, rows, strict=True)), address, size, len(words))
        return
    for matcher, row in zip(inner, rows, strict=True):
        matcher.unsafe_compute_mask_ptr(address + row * size, size)
