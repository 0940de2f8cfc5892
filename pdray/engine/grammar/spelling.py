"""No character of JSON's strings is spelled with an escape that it does not need.

The library lets the names of additional properties have any escape, so that "\\u0061" would pass for another name than
"a", and its value for one that no schema speaks of. Elsewhere, as here, only control characters are escaped as \\u.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

Words = np.ndarray[Any, np.dtype[np.int32]]

PLAIN = 0
# By state: which byte leads where. What is not named leads nowhere, but from PLAIN, where it stays.
STEPS: list[dict[int, int]] = [
    {ord("\\"): 1},
    dict.fromkeys(b'"\\bfnrt', PLAIN) | {ord("u"): 2},
    {ord("0"): 3},
    {ord("0"): 4},
    {ord("0"): 5, ord("1"): 5, ord("7"): 6},
    dict.fromkeys(b"0123456789abcdefABCDEF", PLAIN),
    {ord("F"): PLAIN},
]


class Spelling:
    """The rule, over one vocabulary.

    Args:
        pieces: what the tokens stand for.

    Attributes:
        allowed: by state, the tokens that keep to it.
        places: words of PLAIN's that leave tokens out. banned: those tokens.
    """

    def __init__(self, pieces: Sequence[bytes], num_words: int) -> None:
        self._pieces = pieces
        self.allowed: list[Words] = []
        escaping = [i for i, piece in enumerate(pieces) if b"\\" in piece]
        by_first: dict[int, list[int]] = {}
        for token_id, piece in enumerate(pieces):
            if piece:
                by_first.setdefault(piece[0], []).append(token_id)
        for state, steps in enumerate(STEPS):
            bits = np.full(num_words * 32, state == PLAIN, dtype=bool)
            for first in [] if state == PLAIN else steps:
                bits[by_first.get(first, [])] = True
            doubtful = escaping if state == PLAIN else [i for first in steps for i in by_first.get(first, [])]
            bits[[i for i in doubtful if self.after(state, i) is None]] = False
            bits[len(pieces) :] = True  # the end of the text
            self.allowed.append(np.packbits(bits, bitorder="little").view(np.int32))
        self.places = np.flatnonzero(self.allowed[PLAIN] != -1)
        self.banned = ~self.allowed[PLAIN][self.places]

    def breaks(self, words: Words, rows: Sequence[int]) -> Any:
        """Which of these rows of masks [R, W], all in PLAIN, have a token that does not keep to the rule."""
        places = self.places[self.places < words.shape[1]]
        return (words[np.ix_(rows, places)] & self.banned[: len(places)]).any(1)

    def after(self, state: int, token_id: int) -> int | None:
        """The state behind a token; None if it does not keep to the rule."""
        piece = self._pieces[token_id]
        if state == PLAIN and b"\\" not in piece:
            return PLAIN
        for byte in piece:
            after = STEPS[state].get(byte, PLAIN if state == PLAIN else None)
            if after is None:
                return None
            state = after
        return state
