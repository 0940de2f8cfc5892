"""Masks within strings and whitespace of JSON, without a walk over the vocabulary.

A walk follows every token to its first byte that is not allowed, which takes up to 2 ms near the end of a string with
maxLength. But behind a token that stays within a string, or within whitespace, nothing has changed but how many
characters of it are left. So its mask is an earlier mask of the same run of characters, without the tokens that begin
more of them than are left.

In whitespace that always holds. In strings it does where a text can be read in one way and nothing but its length
limits a string: see free_strings.py. A character that such a schema does not contain, the witness, is then allowed
within strings, and nowhere else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

Words = np.ndarray[Any, np.dtype[np.int32]]

MOST_LEFT = 48  # characters: with more, hardly any token is too long
UNLIMITED = 1 << 62
CONTINUES = bytes(range(0x80, 0xC0))  # a character of UTF-8
NOT_PLAIN = bytes(range(0x20)) + b'"\\\x7f'  # stand for themselves in no string
BREAKS = b"\t\r\n"  # whitespace that stands in no string, name or literal
WHITESPACE = b" " + BREAKS


class Run(NamedTuple):
    """Characters of one kind, as the tokens of a vocabulary see them.

    Attributes:
        num_characters: of each token that is such characters and nothing else; else 0.
        within: [most + 1, num_words]: by number of characters, the tokens that begin with no more.
        examples: tokens of 1, 2, ... most characters.
    """

    num_characters: list[int]
    within: Words
    examples: list[int]

    @classmethod
    def of(
        cls, num_characters: list[int], num_begun: list[int], is_example: Callable[[int], bool], num_words: int
    ) -> Run:
        """Args:
        num_begun: characters that each token begins with.
        """
        by_number: dict[int, int] = {}
        for token_id, num in enumerate(num_characters):
            if num and num not in by_number and is_example(token_id):
                by_number[num] = token_id
        examples: list[int] = []
        while len(examples) < MOST_LEFT and len(examples) + 1 in by_number:
            examples.append(by_number[len(examples) + 1])
        bits = np.ones((len(examples) + 1, num_words * 32), dtype=bool)
        bits[:, : len(num_begun)] = np.array(num_begun) <= np.arange(len(examples) + 1)[:, None]
        return cls(num_characters, np.packbits(bits, axis=1, bitorder="little").view(np.int32), examples)


class Runs:
    """Those of JSON, over one vocabulary.

    Args:
        pieces: what the tokens stand for. special: those that are no text.
        num_words: of a mask.

    Attributes:
        end: the token that ends a string, and does nothing else; None if there is none.
        witnesses: tokens of one character that is not in ASCII, by this character.
        a_break: a token of one byte of BREAKS, if there is any.
        ends_in_break: tokens behind which a text is in whitespace: no string, name or literal has their last byte.
    """

    def __init__(self, pieces: Sequence[bytes], special: frozenset[int], num_words: int) -> None:
        times = Counter(pieces)  # of tokens with equal bytes, masks have only one

        def is_usable(token_id: int) -> bool:
            return token_id not in special and times[pieces[token_id]] == 1

        plain = [0 if i in special else _num_plain(piece) for i, piece in enumerate(pieces)]
        self.string = Run.of(plain, [_num_begun(piece) for piece in pieces], is_usable, num_words)
        leading = [len(piece) - len(piece.lstrip(WHITESPACE)) for piece in pieces]
        blank = [num if num == len(pieces[i]) and i not in special else 0 for i, num in enumerate(leading)]
        breaks = {i for i, piece in enumerate(pieces) if piece and piece[-1] in BREAKS and i not in special}
        self.whitespace = Run.of(blank, leading, is_usable, num_words)
        self.ends_in_break = breaks
        self.a_break = next((i for i in sorted(breaks) if len(pieces[i]) == 1 and is_usable(i)), None)
        self.end = next((i for i, piece in enumerate(pieces) if piece == b'"' and is_usable(i)), None)
        self.witnesses = {
            pieces[i].decode(): i
            for i, num in enumerate(plain)
            if num == 1 and not pieces[i].isascii() and is_usable(i)
        }


class Found(NamedTuple):
    """A mask within a run. num_left: characters that may follow."""

    run: Run
    num_left: int


class _Bits(NamedTuple):
    """Tokens, as words of a mask and bits in them."""

    places: np.ndarray[Any, np.dtype[np.intp]]
    bits: Words

    @classmethod
    def of(cls, token_ids: Sequence[int]) -> _Bits:
        ids = np.array(token_ids, dtype=np.intp)
        return cls(ids // 32, np.left_shift(np.uint32(1), (ids % 32).astype(np.uint32)).view(np.int32))

    def are_in(self, words: Words, rows: Sequence[int]) -> np.ndarray[Any, np.dtype[np.bool_]]:
        found: np.ndarray[Any, np.dtype[np.bool_]] = (words[np.asarray(rows)[:, None], self.places] & self.bits) != 0
        return found


class RunFinder:
    """Finds the masks of one grammar that are within a run.

    Args:
        witness: see above; None: its strings are not free.
        is_limited: whether its strings are.
        has_whitespace: whether whitespace may stand between JSON's tokens, up to some length.
    """

    def __init__(self, runs: Runs, witness: int | None, *, is_limited: bool, has_whitespace: bool) -> None:
        self.runs, self._is_limited = runs, is_limited
        string, whitespace = runs.string, runs.whitespace
        self._string = None
        if witness is not None and runs.end is not None:
            self._string = _Bits.of([witness, runs.end, *string.examples])
        self._whitespace = _Bits.of(whitespace.examples) if has_whitespace and whitespace.examples else None
        self._break = None if runs.a_break is None else _Bits.of([runs.a_break])

    def find(self, words: Words, rows: Sequence[int], are_blank: Sequence[bool]) -> list[Found | None]:
        """By row of these masks [R, W], the run that it is in, if that is known, and could also end here.

        Args:
            are_blank: whether the text before it ends in whitespace, between two tokens of JSON.
        """
        found: list[Found | None] = [None] * len(rows)
        if self._string is not None:
            seen = self._string.are_in(words, rows)
            left = np.where(seen[:, 0] & seen[:, 1], seen[:, 2:].sum(axis=1), 0)
            most, run = len(self.runs.string.examples), self.runs.string
            for i in np.flatnonzero(left).tolist():
                num = int(left[i])
                if num < most:
                    found[i] = Found(run, num)
                elif not self._is_limited:
                    found[i] = Found(run, UNLIMITED)
        blank = [i for i, is_blank in enumerate(are_blank) if is_blank]
        if self._whitespace is not None and blank:
            left = self._whitespace.are_in(words, [rows[i] for i in blank]).sum(axis=1)
            for i, num in zip(blank, left.tolist(), strict=True):
                if 0 < num < len(self.runs.whitespace.examples):
                    found[i] = Found(self.runs.whitespace, num)
        return found

    def may_break(self, words: Words, rows: Sequence[int]) -> list[bool]:
        """By row, whether it is the mask of a text that is between two tokens of JSON, or could be."""
        return [False] * len(rows) if self._break is None else self._break.are_in(words, rows)[:, 0].tolist()


def _num_plain(piece: bytes) -> int:
    """Characters of a token that are whole, and stand for themselves in a string; 0 if it has any other."""
    if len(piece.translate(None, NOT_PLAIN)) < len(piece):
        return 0
    try:
        return len(piece.decode())
    except UnicodeDecodeError:
        return 0


def _num_begun(piece: bytes) -> int:
    """Characters that a token begins before its first quote, within a string; an escape stands for one."""
    num_escapes = 0
    if b'"' in piece or b"\\" in piece:
        piece, num_escapes = _without_escapes(piece)
    return len(piece.translate(None, CONTINUES)) + num_escapes


def _without_escapes(piece: bytes) -> tuple[bytes, int]:
    """What stands before the first quote but escapes, and how many of these."""
    kept, num_escapes, at = bytearray(), 0, 0
    while at < len(piece) and piece[at] != ord('"'):
        if piece[at] == ord("\\"):
            num_escapes += 1
            at += 6 if piece[at + 1 : at + 2] == b"u" else 2
        else:
            kept.append(piece[at])
            at += 1
    return bytes(kept), num_escapes
