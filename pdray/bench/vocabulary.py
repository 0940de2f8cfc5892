"""A vocabulary for models without a tokenizer: what masks cost depends on how many tokens there are, and which."""

from __future__ import annotations

import numpy as np

from pdray.engine.grammar.pieces import TokenPieces

LETTERS = b"etaoinshrdlucmfwypvbgkjqxz"
PUNCTUATION = [
    b'{"',
    b'":',
    b'": ',
    b'": "',
    b'", "',
    b'",',
    b'"}',
    b'"},',
    b"[{",
    b"}]",
    b"],",
    b"[]",
    b"true",
    b"null",
]
MEAN_LETTERS = 6.0


def make_vocabulary(vocab_size: int) -> TokenPieces:
    """Every byte, whitespace of several lengths, JSON's punctuation, then words, half of them behind a space.

    Of a small vocabulary the first of these alone. The same for each call.
    """
    rng = np.random.default_rng(0)
    pieces = [bytes([value]) for value in range(256)] + PUNCTUATION + [b" " * n for n in range(2, 17)]
    known = set(pieces)
    shares = 1.0 / np.arange(1, len(LETTERS) + 1)
    letters = np.frombuffer(LETTERS, np.uint8)
    while len(pieces) < vocab_size:
        lengths = 1 + rng.poisson(MEAN_LETTERS - 1, size=vocab_size)
        text = rng.choice(letters, size=int(lengths.sum()), p=shares / shares.sum()).tobytes()
        ends = np.cumsum(lengths)
        spaces = rng.random(vocab_size) < 0.5
        for end, length, has_space in zip(ends.tolist(), lengths.tolist(), spaces.tolist(), strict=True):
            piece = b" " * has_space + text[end - length : end]
            if piece not in known:
                known.add(piece)
                pieces.append(piece)
    return TokenPieces(pieces[:vocab_size], frozenset())
