"""Masks of a grammar by where its texts stand: outputs under one schema walk the vocabulary once for each place.

A mask belongs to a position in JSON (json_text.py), and behind a token the next one is found by one look-up. It holds
for every text at that position, but where the grammar leaves one text only, of several bytes: which tokens are allowed
then depends on the last one too (the library writes such a text as the model's own tokenizer would), and it is known by
both. In a run (runs.py) all masks follow from that of its first text that has been seen, but for the one at its end.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Sequence
from typing import NamedTuple

from pdray.engine.grammar.json_text import Frame, JsonRules, JsonText
from pdray.engine.grammar.runs import UNLIMITED, WHITESPACE, Found, Run, Words, num_plain

COMMAS = re.compile(rb"(?<!,),")
MAX_BYTES = 256 << 20  # of the masks of all grammars of a compiler
MAX_MASKS = 4096  # of one grammar
MAX_EDGES = 65_536  # of one grammar, some 200 bytes each; beyond, positions are looked up


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
    """Where an output stands.

    Attributes:
        num_left: characters of the node's run that may follow.
        text: the position itself. before: frames of the one before, of which other texts may have other counts; the
            same object where they stay.
    """

    node: Node
    num_left: int
    text: JsonText
    before: tuple[Frame, ...] = ()

    def text_after(self, before: tuple[Frame, ...]) -> JsonText:
        """The position, where this is a node's ``after``, behind a text with these frames."""
        _, _, text, others = self
        if before == others:
            return text
        frames, phase, partial, blanks = text
        if frames is others:
            return JsonText(before, phase, partial, blanks)
        num = len(before)
        counted = [before[i] if i < num and isinstance(frame, int) else frame for i, frame in enumerate(frames)]
        return JsonText(tuple(counted), phase, partial, blanks)


class Node:
    """A mask that has been walked.

    Attributes:
        text: the first text's position that was seen with it.
        found: the run that it is in. run, num_left: likewise; None and 0 for no run.
        spelling_state, may_break, ended: see GrammarMatcher.
        after: by token, the place behind it, where that is the same for all texts that have this node.
    """

    __slots__ = ("after", "ended", "found", "mask", "may_break", "num_left", "run", "spelling_state", "text")

    def __init__(
        self, text: JsonText, mask: Mask, found: Found | None, spelling_state: int, *, may_break: bool, ended: bool
    ) -> None:
        self.text, self.mask, self.found = text, mask, found
        self.run: Run | None = None if found is None else found.run
        self.num_left = 0 if found is None else found.num_left
        self.spelling_state, self.may_break, self.ended = spelling_state, may_break, ended
        self.after: dict[int, Place] = {}


class MaskMemory:
    """Bounds what the grammars of a compiler remember: those that have not learnt anything for the longest forget."""

    def __init__(self, pieces: Sequence[bytes], max_bytes: int = MAX_BYTES) -> None:
        self.pieces = pieces
        self._max_bytes = max_bytes
        self._grammars: weakref.WeakKeyDictionary[KnownMasks, int] = weakref.WeakKeyDictionary()
        self._most_commas: int | None = None

    def note(self, known: KnownMasks, num_bytes: int) -> None:
        """It has learnt a mask of so many bytes."""
        self._grammars[known] = self._grammars.pop(known, 0) + num_bytes
        while len(self._grammars) > 1 and sum(self._grammars.values()) > self._max_bytes:
            oldest = next(iter(self._grammars.keys()))
            del self._grammars[oldest]
            oldest.forget()

    def forgot(self, known: KnownMasks) -> None:
        self._grammars.pop(known, None)

    @property
    def most_commas(self) -> int:
        """Of a token, without those right behind others, which are in no JSON."""
        if self._most_commas is None:
            self._most_commas = max((len(COMMAS.findall(piece)) for piece in self.pieces if b"," in piece), default=0)
        return self._most_commas


class KnownMasks:
    """Of one grammar. For the engine's thread.

    Args:
        string: the run of its finder.
    """

    def __init__(self, rules: JsonRules, memory: MaskMemory, string: Run) -> None:
        self.rules, self.pieces = rules, memory.pieces
        self._memory, self._string = memory, string
        self._alike = rules.alike(memory.most_commas)
        self._num_edges = 0
        # By position (see _key()). None: known by the last token too, or where it is long, also by all counts.
        self._nodes: dict[JsonText, Node | None] = {}
        self._forced: dict[tuple[JsonText, int | None], Node] = {}
        self._only: dict[tuple[JsonText, int | None], Node] = {}
        self._runs: dict[JsonText, tuple[Node, int]] = {}  # by _Within.text: a node of the run, and its num_before
        self._ends: dict[JsonText, Node] = {}  # likewise: that behind as many characters as the run may have

    def __len__(self) -> int:
        return sum([len(self._nodes), len(self._forced), len(self._only), len(self._runs), len(self._ends)])

    def forget(self) -> None:
        """Begin anew. Outputs keep what they have found."""
        runs = [node for node, _ in self._runs.values()]
        for node in [*self._nodes.values(), *self._forced.values(), *self._only.values(), *runs, *self._ends.values()]:
            if node is not None:
                node.after.clear()
        self._nodes.clear()
        self._forced.clear()
        self._only.clear()
        self._runs.clear()
        self._ends.clear()
        self._num_edges = 0
        self._memory.forgot(self)

    def find(self, text: JsonText, last: int | None) -> Place | None:
        """Where an output at this position is, if the mask is known; last: its last token."""
        within = self._within(text)
        if within is not None and (first := self._runs.get(within.text)) is not None:
            node, num_before = first
            more = within.num_before - num_before
            if 0 <= more < node.num_left:
                return Place(node, node.num_left if node.num_left == UNLIMITED else node.num_left - more, text)
            if more == node.num_left and (end := self._ends.get(within.text)) is not None:
                return Place(end, end.num_left, text)
        key = self._key(text)
        here = self._nodes.get(key)
        if here is None and key in self._nodes:
            here = self._forced.get((key, last)) or self._only.get((text, last))
        return None if here is None else Place(here, here.num_left, text)

    def _key(self, text: JsonText) -> JsonText:
        """The same for positions with the same masks."""
        alike = self._alike
        if alike is None:
            return text
        frames = tuple([alike[frame] if isinstance(frame, int) else frame for frame in text.frames])
        return JsonText(frames, text.phase, text.partial, text.blanks)

    def wants(self, text: JsonText, found: Found | None) -> bool:
        """Whether others may come to this position, so that its mask is worth keeping."""
        return (
            self.rules.is_common(text) or (found is not None and self._within(text) is not None) or self._ends_run(text)
        )

    def _ends_run(self, text: JsonText) -> bool:
        within = self._within(text)
        if within is None or (first := self._runs.get(within.text)) is None:
            return False
        node, num_before = first
        return within.num_before == num_before + node.num_left

    def add(self, node: Node, last: int | None, forced: bytes) -> None:
        """Keep this mask for its position, if others may come there.

        Args:
            last: the text's last token. forced: what must follow.
        """
        text, within = node.text, self._within(node.text)
        key, is_forced = self._key(text), len(forced) > 1
        if len(self) >= MAX_MASKS:
            self.forget()
        if within is not None and node.found is not None:
            self._runs[within.text] = node, within.num_before
        elif within is not None and not is_forced and self._ends_run(text):
            self._ends[within.text] = node
        elif not self.rules.is_common(text):
            return
        elif not is_forced:
            self._nodes[key] = node
        else:
            self._nodes[key] = None
            if forced.count(b",") <= self._memory.most_commas:
                self._forced[key, last] = node
            else:
                self._only[text, last] = node
        self._memory.note(self, node.mask.words.nbytes)

    def connect(self, before: Node, text: JsonText, token_id: int, place: Place) -> None:
        """An output at ``before``, or further in its run, came from this position to this place by this token."""
        if self._num_edges >= MAX_EDGES or (before.found is not None and not self._leaves(before, token_id)):
            return
        frames = place.text.frames
        counts = [(i, frame) for i, frame in enumerate(text.frames[: len(frames)]) if isinstance(frame, int)]
        if counts and (b"]" in self.pieces[token_id] or any(frames[i] != count for i, count in counts)):
            return  # elsewhere, other numbers of items
        after = place.text
        if frames == text.frames:
            after = JsonText(text.frames, after.phase, after.partial, after.blanks)
        self._num_edges += 1
        before.after[token_id] = Place(place.node, place.num_left, after, text.frames)

    def _leaves(self, node: Node, token_id: int) -> bool:
        """Whether this token ends the node's run: what is behind it does not depend on how much was before."""
        assert node.found is not None
        piece = self.pieces[token_id]
        if node.found.run is self._string:
            return b'"' in piece and b"\\" not in piece
        return bool(piece.lstrip(WHITESPACE))

    def _within(self, text: JsonText) -> _Within | None:
        """Whitespace, or a string of plain characters that is no name, whatever of them were before."""
        if not text.partial:
            if not text.blanks:
                return None
            return _Within(self._key(JsonText(text.frames, text.phase, b"", -1)), text.blanks)
        if not text.is_in_string:
            return None
        num = num_plain(text.partial[1:])
        if not num and text.partial != b'"':
            return None
        return _Within(self._key(JsonText(text.frames, text.phase, b'"*', 0)), num)


class _Within(NamedTuple):
    """A run's position without what was in it before, and how many characters that was."""

    text: JsonText
    num_before: int
