"""Masks within strings of limited length, without a walk over the vocabulary.

Near the end of a string with maxLength a walk takes up to 2 ms: few classes of tokens are allowed as a whole, and those
that are too long are followed to their last allowed character. But behind a token that stays within the string nothing
has changed but how many characters are left. So its mask is an earlier mask of the same string, without the tokens that
begin more characters than are left.

That holds where a text can be read in one way, and nothing but its length limits a string. has_free_strings() says of
which schemas it does. A character that such a schema does not contain, the witness, is then allowed within strings, and
nowhere else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np

from pdray.engine.grammar.keywords import ANNOTATIONS, Schema, resolve, subschemas
from pdray.structured_outputs import StructuredOutputsParams

Words = np.ndarray[Any, np.dtype[np.int32]]

MOST_LEFT = 32  # characters: with more, hardly any token is too long
ASCII_FORMATS = frozenset({"date", "time", "date-time", "hostname", "uuid", "ipv4", "ipv6"})
TYPES = frozenset({"null", "boolean", "integer", "number", "string", "array", "object"})
CONTINUES = bytes(range(0x80, 0xC0))  # a character of UTF-8
NOT_PLAIN = bytes(range(0x20)) + b'"\\\x7f'  # bytes that no character of a string is, or that do not stand for themselves


class Lengths:
    """What the tokens of a vocabulary add to a string of JSON.

    Args:
        pieces: what the tokens stand for. special: those that are no text.
        num_words: of a mask.

    Attributes:
        num_characters: of each token that is whole characters of a string and nothing else; else 0.
        within: [most + 1, num_words]: by number of characters, the tokens that begin no more before the string ends.
        most: for every number of characters up to here there is a token in ``examples``, the one of 1 first.
        end: the token that ends a string, and does nothing else; None if there is none.
        witnesses: tokens of one character that is not in ASCII, by this character.
    """

    def __init__(self, pieces: Sequence[bytes], special: frozenset[int], num_words: int) -> None:
        self.num_characters = [_num_characters(piece) for piece in pieces]
        times = Counter(pieces)  # of tokens with equal bytes, masks have only one
        usable = [i for i, piece in enumerate(pieces) if piece and times[piece] == 1 and i not in special]
        by_number: dict[int, int] = {}
        for i in usable:
            by_number.setdefault(self.num_characters[i], i)
        self.examples: list[int] = []
        while len(self.examples) < MOST_LEFT and (example := by_number.get(len(self.examples) + 1)) is not None:
            self.examples.append(example)
        self.most = len(self.examples)
        self.end = next((i for i in usable if pieces[i] == b'"'), None)
        self.witnesses = {
            pieces[i].decode(): i for i in usable if self.num_characters[i] == 1 and not pieces[i].isascii()
        }
        begun = np.array([_num_begun(piece) for piece in pieces])
        bits = np.ones((self.most + 1, num_words * 32), dtype=bool)
        bits[:, : len(pieces)] = begun <= np.arange(self.most + 1)[:, None]
        self.within: Words = np.packbits(bits, axis=1, bitorder="little").view(np.int32)


class StringLimits(NamedTuple):
    """Finds out from masks of one schema how many characters may follow.

    Attributes:
        places, bits: words of a mask, and bits in them: of the witness, of the end of a string, of the examples.
    """

    lengths: Lengths
    places: np.ndarray[Any, np.dtype[np.intp]]
    bits: Words

    @classmethod
    def of(cls, lengths: Lengths, schema: Schema) -> StringLimits | None:
        """Of a limited_schema(); None if the vocabulary lacks a token that is needed."""
        if lengths.end is None:
            return None
        characters = set(msgspec.json.encode(schema).decode())
        witness = next((i for character, i in lengths.witnesses.items() if character not in characters), None)
        if witness is None:
            return None
        token_ids = np.array([witness, lengths.end, *lengths.examples])
        bits = np.left_shift(np.uint32(1), (token_ids % 32).astype(np.uint32)).view(np.int32)
        return cls(lengths, token_ids // 32, bits)

    def left(self, words: Words, rows: Sequence[int]) -> list[int]:
        """How many characters each of these masks [R, W] leaves to its string, which may end now; 0 if that is not so,
        or more than is known."""
        found = (words[np.ix_(rows, self.places)] & self.bits) != 0
        num_left = found[:, 2:].sum(axis=1)
        is_known = found[:, 0] & found[:, 1] & (num_left < self.lengths.most)
        return list(np.where(is_known, num_left, 0).tolist())


def limited_schema(params: StructuredOutputsParams) -> Schema | None:
    """The schema, if it limits strings whose masks follow from earlier ones. It has been compiled."""
    if params.kind != "json" or params.whitespace_pattern is not None:
        return None
    schema: Schema = msgspec.json.decode(params.text)
    is_limited = any("maxLength" in part for _, part in subschemas(schema))
    return schema if is_limited and has_free_strings(schema) else None


def has_free_strings(schema: Schema) -> bool:
    """Whether no text of this schema can be read in two ways, and no string that may have any character outside of
    ASCII is limited by anything but its length. The schema's keywords have been checked."""
    for _, part in subschemas(schema):
        if not part.keys().isdisjoint(("pattern", "patternProperties", "allOf")):
            return False
        if part.get("format", "date") not in ASCII_FORMATS:
            return False
        combining = part.keys() & {"anyOf", "oneOf", "$ref"}
        if combining and part.keys() - ANNOTATIONS != combining or len(combining) > 1:
            return False
        seen: set[str] = set()
        for branch in part.get("anyOf") or part.get("oneOf") or ():
            types = _types(resolve(schema, branch))
            if not seen.isdisjoint(types):
                return False
            seen |= types
    return True


def _types(schema: Any) -> set[str]:
    """Of the values that it allows, and maybe more."""
    named = schema.get("type") if isinstance(schema, dict) else None
    types = {named} if isinstance(named, str) else set(named) if isinstance(named, list) else set(TYPES)
    return types | {"integer"} if "number" in types else types


def _num_begun(piece: bytes) -> int:
    """Characters that a token begins before its first quote, within a string; escapes stand for one."""
    inner, num_escapes = piece, 0
    if b'"' in piece or b"\\" in piece:
        inner, num_escapes = _without_escapes(piece)
    return len(inner.translate(None, CONTINUES)) + num_escapes


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


def _num_characters(piece: bytes) -> int:
    """Of a token that is whole characters of a string, each of which stands for itself; else 0."""
    if len(piece.translate(None, NOT_PLAIN)) < len(piece):
        return 0
    try:
        return len(piece.decode())
    except UnicodeDecodeError:
        return 0
