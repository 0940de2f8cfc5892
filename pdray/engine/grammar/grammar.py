"""A compiled grammar."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from pdray.engine.grammar.known_masks import KnownMasks
from pdray.engine.grammar.matcher import GrammarMatcher, num_words
from pdray.engine.grammar.runs import RunFinder, Words
from pdray.engine.grammar.spelling import Spelling
from pdray.engine.grammar.starts import Starts


class Grammar(NamedTuple):
    """What a compiler makes, for all requests with the same parameters.

    Attributes:
        starts: of the outputs that follow it.
        special: see TokenPieces.
        spelling: of JSON; None for other texts.
        finder: of JSON's strings and whitespace, in which masks follow from earlier ones; None: they never do.
        known: masks that its outputs have met; None: what follows depends on more than a position in JSON.
    """

    starts: Starts
    vocab_size: int
    special: frozenset[int]
    spelling: Spelling | None = None
    finder: RunFinder | None = None
    known: KnownMasks | None = None

    def matcher(self, token_ids: Iterable[int] = ()) -> GrammarMatcher:
        """One that has taken these tokens.

        Raises:
            GrammarError: they do not begin any text of the grammar.
        """
        matcher = GrammarMatcher(self.starts, self.vocab_size, self.spelling, self.finder, self.known)
        for token_id in token_ids:
            matcher.take(token_id)
        return matcher

    def empty_mask(self) -> Words:
        """Room for GrammarMatcher.fill()."""
        return np.zeros(num_words(self.vocab_size + 1), dtype=np.int32)

    def has_text(self) -> bool:
        """Whether a first token is allowed. On any thread."""
        words = self.empty_mask()
        self._replace(known=None).matcher().fill(words)
        words[self.vocab_size // 32] &= (1 << self.vocab_size % 32) - 1  # the end's bit, and those after it
        return bool(words.any())
