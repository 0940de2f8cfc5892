"""How far a text of JSON has come, as far as a schema can tell: texts with equal positions have the same masks.

A position leaves out what a grammar without choices between like values forgets: values that are complete, names that
no schema speaks of, how many items there are beyond those that are counted, and which whitespace there was.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from typing import NamedTuple

import msgspec

from pdray.engine.grammar.free_strings import has_one_way
from pdray.engine.grammar.keywords import Schema, subschemas
from pdray.engine.grammar.runs import WHITESPACE

QUOTE, BACKSLASH, COMMA, COLON = b'"\\,:'
SCALAR = frozenset(b"+-.0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
OTHER_NAME = b'"'  # stands for names that the schema does not have; no name is spelled like this between its quotes
MAX_PREFIXES = 4096
MAX_SCALAR = 4  # characters: few texts begin with the same longer number
MAX_COUNTED = 10_000  # items
MAX_EXACT = 64  # characters of a string's text that are kept
# A string of which no more is kept than whether a backslash ends it. No string of JSON begins like this.
INEXACT = b'"\0'


class Phase(enum.IntEnum):
    """What stands here or has begun."""

    VALUE = 0  # or the end of an array, if it has no items
    NAME = 1  # or the end of an object, if it has no names
    COLON = 2
    AFTER = 3  # a value


Frame = int | tuple[bytes, ...]  # an array's complete items; an object's names


class JsonText(NamedTuple):
    """A position.

    Attributes:
        frames: arrays and objects that are open, the outermost first.
        partial: the name, string, number or literal that has begun.
        blanks: bytes of whitespace right before this.
    """

    frames: tuple[Frame, ...] = ()
    phase: Phase = Phase.VALUE
    partial: bytes = b""
    blanks: int = 0

    @property
    def is_in_string(self) -> bool:
        """Whether a string has begun that is no name."""
        return self.phase is Phase.VALUE and self.partial[:1] == b'"'


START = JsonText()


class JsonRules(NamedTuple):
    """Of one schema.

    Attributes:
        names: of its properties, as they stand in a text.
        prefixes: of its strings, with the quote before them.
        most_items: of an array, that make a difference.
        limits: numbers of items of arrays, least and most ones. has_tuples: what an item may be depends on its place.
    """

    names: frozenset[bytes]
    prefixes: frozenset[bytes]
    most_items: int
    limits: frozenset[int] = frozenset()
    has_tuples: bool = False

    @classmethod
    def of(cls, schema: Schema) -> JsonRules | None:
        """None if a position does not say all that a mask depends on. The schema's keywords have been checked."""
        names: set[str] = set()
        strings: set[str] = set()
        limits: set[int] = set()
        has_tuples = False
        if not has_one_way(schema):
            return None
        for _, part in subschemas(schema):
            if not part.keys().isdisjoint(("minProperties", "maxProperties")):
                return None
            named, required, listed = (part.get(key) for key in ("properties", "required", "enum"))
            names |= set(named if isinstance(named, dict) else ())
            names |= {each for each in (required if isinstance(required, list) else ()) if isinstance(each, str)}
            values = [*(listed if isinstance(listed, list) else ()), part.get("const")]
            if any(isinstance(value, dict | list) for value in values):
                return None
            strings |= {value for value in values if isinstance(value, str)}
            limits |= {int(n) for n in (part.get("minItems"), part.get("maxItems")) if isinstance(n, int | float)}
            for listed in (part.get("prefixItems"), part.get("items")):
                if isinstance(listed, list):
                    has_tuples = True
                    limits.add(len(listed))
        spelled = frozenset(msgspec.json.encode(name)[1:-1] for name in names)
        prefixes = frozenset(_prefixes([*names, *strings]))
        return cls(spelled, prefixes, max(limits, default=0) + 1, frozenset(limits), has_tuples)

    def alike(self, most_commas: int) -> list[int] | None:
        """By number of items of an array, a number that is the same for those of which no mask can tell which it is:
        as many items may follow, or must, as no token has. None: all numbers differ.

        Args:
            most_commas: of a token.
        """
        if self.has_tuples or self.most_items > MAX_COUNTED:
            return None
        far, kinds = most_commas + 2, dict[tuple[int, ...], int]()
        numbers = list[int]()
        for num in range(self.most_items + 1):
            kind = min(num, 1), *(min(max(limit - num, 0), far) for limit in sorted(self.limits))
            numbers.append(kinds.setdefault(kind, len(kinds)))
        return numbers

    def after(self, text: JsonText, piece: bytes) -> JsonText | None:
        """The position behind these bytes; None if they are no JSON there."""
        frames, phase, partial, blanks = text
        if not partial:
            num_bytes = len(piece)
            piece = piece.lstrip(WHITESPACE)
            blanks += num_bytes - len(piece)
        for byte in piece:
            if partial[:1] == b'"':
                ends = byte == QUOTE and (len(partial) - len(partial.rstrip(b"\\"))) % 2 == 0
                partial += bytes((byte,))
                if not ends:
                    if phase is Phase.VALUE and len(partial) > MAX_EXACT and partial not in self.prefixes:
                        num = len(partial) - len(partial.rstrip(b"\\"))
                        partial = INEXACT + b"\\" * (num % 2)
                elif phase is Phase.NAME:
                    frames, phase, partial = self._named(frames, partial[1:-1]), Phase.COLON, b""
                else:
                    frames, phase, partial = self._complete(frames), Phase.AFTER, b""
                continue
            if partial:
                if byte in SCALAR:
                    partial += bytes((byte,))
                    continue
                frames, phase, partial = self._complete(frames), Phase.AFTER, b""
            if byte in WHITESPACE:
                blanks += 1
                continue
            blanks = 0
            if byte in b"]}":
                is_array = byte == b"]"[0]
                if not frames or isinstance(frames[-1], int) is not is_array:
                    return None
                if phase is not Phase.AFTER and (frames[-1] or phase is Phase.COLON):
                    return None
                frames, phase = self._complete(frames[:-1]), Phase.AFTER
            elif phase is Phase.VALUE:
                if byte == b"{"[0]:
                    frames, phase = (*frames, ()), Phase.NAME
                elif byte == b"["[0]:
                    frames = (*frames, 0)
                elif byte == QUOTE or byte in SCALAR:
                    partial = bytes((byte,))
                else:
                    return None
            elif phase is Phase.NAME and byte == QUOTE:
                partial = b'"'
            elif phase is Phase.COLON and byte == COLON:
                phase = Phase.VALUE
            elif phase is Phase.AFTER and byte == COMMA and frames:
                phase = Phase.VALUE if isinstance(frames[-1], int) else Phase.NAME
            else:
                return None
        return JsonText(frames, phase, partial, blanks)

    def _complete(self, frames: tuple[Frame, ...]) -> tuple[Frame, ...]:
        """A value is, in the innermost of them."""
        if not frames or not isinstance(frames[-1], int):
            return frames
        return (*frames[:-1], min(frames[-1] + 1, self.most_items))

    def _named(self, frames: tuple[Frame, ...], name: bytes) -> tuple[Frame, ...]:
        names = frames[-1]
        assert isinstance(names, tuple), "a name stands in an object"
        if b"\\" not in name and name not in self.names:
            name = OTHER_NAME
            if names[-1:] == (name,):
                return frames
        return (*frames[:-1], (*names, name))

    def is_common(self, text: JsonText) -> bool:
        """Whether many texts may come to this position."""
        partial = text.partial
        if partial[:1] == b'"':
            return partial == b'"' or partial in self.prefixes
        return len(partial) <= MAX_SCALAR or partial[0] not in b"-0123456789"


def _prefixes(strings: list[str]) -> Iterator[bytes]:
    num_left = MAX_PREFIXES
    for text in strings:
        spelled = msgspec.json.encode(text)
        num_left -= len(spelled)
        if num_left < 0:
            return
        yield from (spelled[:end] for end in range(1, len(spelled)))
