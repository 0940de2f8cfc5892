"""Masks of a grammar by where its texts stand: outputs under one schema walk the vocabulary once for each place.

A mask belongs to a position in JSON (json_text.py), and behind a token the next one is found by one look-up. It holds
for every text at that position, but where the grammar leaves only one next byte: which tokens are allowed then depends
on the last one too (the library writes what is left as the model's own tokenizer would), and it is known by both. In a
run (runs.py) all masks follow from that of its first text that has been seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from pdray.engine.grammar.json_text import JsonRules, JsonText
from pdray.engine.grammar.runs import UNLIMITED, WHITESPACE, Found, Run, Words, num_plain

MAX_BYTES = 256 << 20  # of the masks of all grammars of a compiler
MAX_MASKS = 4096  # of one grammar
MAX_EDGES = 512  # of a mask; beyond, a position is looked up


class Mask:
    """The tokens that may come next, narrow() included; compared by identity.

    Attributes:
        may_end: the text may end here.
    """

    __slots__ = ("may_end", "words")

    def __init__(self, words: Words, vocab_size: int) -> None:
        self.words = words
        self.may_end = bool(words[vocab_size // 32] >> (vocab_size % 32) & 1)


class Place(NamedTuple):
    """Where an output stands. num_left: characters of the node's run that may follow. text: the position itself."""

    node: Node
    num_left: int
    text: JsonText


class Node:
    """A mask that has been walked.

    Attributes:
        text: the first text's position that was seen with it.
        found: the run that it is in.
        spelling_state, may_break, ended: see GrammarMatcher.
        after: by token, the place behind it, where that is the same for all texts that have this node.
    """

    __slots__ = ("after", "ended", "found", "mask", "may_break", "spelling_state", "text")

    def __init__(
        self, text: JsonText, mask: Mask, found: Found | None, spelling_state: int, *, may_break: bool, ended: bool
    ) -> None:
        self.text, self.mask, self.found = text, mask, found
        self.spelling_state, self.may_break, self.ended = spelling_state, may_break, ended
        self.after: dict[int, Place] = {}

    @property
    def num_left(self) -> int:
        return 0 if self.found is None else self.found.num_left


class MaskMemory:
    """Bounds what the grammars of a compiler remember: those that have not learnt anything for the longest forget."""

    def __init__(self, pieces: Sequence[bytes], max_bytes: int = MAX_BYTES) -> None:
        self.pieces = pieces
        self._max_bytes, self._num_bytes = max_bytes, 0
        self._grammars: weakref.WeakKeyDictionary[KnownMasks, int] = weakref.WeakKeyDictionary()
        self._others: dict[bytes, Words] = {}  # by first byte, the tokens that do not begin with it

    def note(self, known: KnownMasks, num_bytes: int) -> None:
        """It has learnt a mask of so many bytes."""
        self._grammars[known] = self._grammars.pop(known, 0) + num_bytes
        while len(self._grammars) > 1 and sum(self._grammars.values()) > self._max_bytes:
            oldest = next(iter(self._grammars.keys()))
            del self._grammars[oldest]
            oldest.forget()

    def forgot(self, known: KnownMasks) -> None:
        self._grammars.pop(known, None)

    def has_one_next_byte(self, words: Words) -> bool:
        """Whether all tokens of this mask begin alike, and the text may not end."""
        place = int((words != 0).argmax())
        word = int(words[place]) & 0xFFFFFFFF
        token_id = place * 32 + (word & -word).bit_length() - 1
        if not word or token_id >= len(self.pieces):
            return False  # it allows no token
        return not (words & self._others_than(self.pieces[token_id][:1])).any()

    def _others_than(self, first: bytes) -> Words:
        if first not in self._others:
            bits = np.ones(-(-(len(self.pieces) + 1) // 32) * 32, dtype=bool)
            bits[[i for i, piece in enumerate(self.pieces) if piece[:1] == first]] = False
            self._others[first] = np.packbits(bits, bitorder="little").view(np.int32)
        return self._others[first]


class KnownMasks:
    """Of one grammar. For the engine's thread.

    Args:
        string: the run of its finder.
    """

    def __init__(self, rules: JsonRules, memory: MaskMemory, string: Run) -> None:
        self.rules, self.pieces = rules, memory.pieces
        self._memory, self._string = memory, string
        self._nodes: dict[Any, Node | None] = {}  # by position, or position and last token where the first gives None
        self._runs: dict[
            JsonText, tuple[Node, int]
        ] = {}  # by _Within.text: a node of the run, and characters before it

    def __len__(self) -> int:
        return len(self._nodes) + len(self._runs)

    def forget(self) -> None:
        """Begin anew. Outputs keep what they have found."""
        for node in [*self._nodes.values(), *(node for node, _ in self._runs.values())]:
            if node is not None:
                node.after.clear()
        self._nodes.clear()
        self._runs.clear()
        self._memory.forgot(self)

    def find(self, text: JsonText, last: int | None) -> Place | None:
        """Where an output at this position is, if the mask is known; last: its last token."""
        within = self._within(text)
        if within is not None and (first := self._runs.get(within.text)) is not None:
            node, num_before = first
            more = within.num_before - num_before
            if 0 <= more < node.num_left:
                return Place(node, node.num_left if node.num_left == UNLIMITED else node.num_left - more, text)
        node_here = self._nodes.get(text)
        if node_here is None and text in self._nodes:
            node_here = self._nodes.get((text, last))
        return None if node_here is None else Place(node_here, node_here.num_left, text)

    def wants(self, text: JsonText, found: Found | None) -> bool:
        """Whether a mask of this position is worth to be kept: whether others may come there."""
        return self.rules.is_common(text) or (found is not None and self._within(text) is not None)

    def add(self, node: Node, last: int | None) -> None:
        """Keep this mask for its position."""
        text = node.text
        within = None if node.found is None else self._within(text)
        if len(self) >= MAX_MASKS:
            self.forget()
        if within is not None:
            self._runs[within.text] = node, within.num_before
        elif self._memory.has_one_next_byte(node.mask.words):
            self._nodes[text] = None
            self._nodes[text, last] = node
        else:
            self._nodes[text] = node
        self._memory.note(self, node.mask.words.nbytes)

    def connect(self, before: Node, token_id: int, place: Place) -> None:
        """An output at ``before``, or further in its run, came to this place by this token."""
        if len(before.after) < MAX_EDGES and (before.found is None or self._leaves(before, token_id)):
            before.after[token_id] = place

    def _leaves(self, node: Node, token_id: int) -> bool:
        """Whether this token ends the node's run: what is behind it does not depend on how much was before."""
        assert node.found is not None
        piece = self.pieces[token_id]
        if node.found.run is self._string:
            return b'"' in piece and b"\\" not in piece
        return bool(piece.lstrip(WHITESPACE))

    def _within(self, text: JsonText) -> _Within | None:
        """Whitespace, or a string of plain characters that is no name, whatever of them were before."""
        if text.partial:
            if not text.is_in_string:
                return None
            num = num_plain(text.partial[1:])
            return _Within(JsonText(text.frames, text.phase, b'"*', 0), num) if num or text.partial == b'"' else None
        return _Within(JsonText(text.frames, text.phase, b"", -1), text.blanks) if text.blanks else None


class _Within(NamedTuple):
    """A run's position without what was in it before, and how many characters that was."""

    text: JsonText
    num_before: int
