"""What is known of an output's next mask before the vocabulary is walked: within a run, and at known positions."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from pdray.engine.grammar.json_text import START, JsonText
from pdray.engine.grammar.known_masks import KnownMasks, Mask, Node, Place
from pdray.engine.grammar.runs import UNLIMITED, Found, Run, RunFinder, Words
from pdray.engine.grammar.spelling import PLAIN, Spelling
from pdray.engine.grammar.starts import Starts

FILLED = -1


class Follower:
    """Of one output. Masks may be known by its run (runs.py) in any JSON, by its position (known_masks.py) only in
    JSON of which a position says all, and while its grammar is not expensive (starts.py).

    Attributes:
        ended: the text is complete, and nothing can follow it.
        spelling, spelling_state: see Spelling.
        mask: the next one, narrow() included, if it is known, but for what next_mask() takes away; else None.
    """

    def __init__(self, starts: Starts, vocab_size: int, spelling: Spelling | None, finder: RunFinder | None) -> None:
        self._starts, self._vocab_size, self.finder = starts, vocab_size, finder
        self.spelling, self.spelling_state = spelling, PLAIN
        self.ended = False
        self.mask: Mask | None = None
        self._last: int | None = None  # token taken
        self._may_break = False  # before it
        self._done: list[int] = []  # so far: tokens taken, and FILLED
        self._run: Run | None = None  # that the text is in, if the next masks follow from this one
        self._num_left = 0  # characters of the run
        self._is_new = False  # the mask, which nothing has been drawn by
        self._known: KnownMasks | None = None
        self._node: Node | None = None  # of the mask
        self._left: Node | None = None  # by the last token, from _before
        self._before: JsonText | None = None
        self._text: JsonText | None = None  # position, without _inside; None: not known
        self._inside: list[int] = []  # tokens of the run

    def _follow(self, known: KnownMasks) -> None:
        """Begin, before the first token."""
        self._known, self._text = known, START
        if (place := known.find(START, None)) is not None:
            self._enter(place)

    def _enter(self, place: Place) -> None:
        """The next mask is known, and so is all that comes with it."""
        node = place.node
        self._node, self._num_left, self._text, _ = place
        self.mask, self._run = node.mask, node.run
        self.spelling_state, self._may_break, self.ended = node.spelling_state, node.may_break, node.ended
        self._is_new = True
        self._inside.clear()

    def learn(self, words: Words, found: Found | None, forced: Callable[[], bytes], *, may_break: bool = False) -> None:
        """This mask was walked: narrow it, and keep it where later ones may follow from it or be the same.

        Args:
            found: the run that it is in. may_break: see RunFinder.may_break(). forced: gives what must follow.
        """
        self._may_break = may_break
        known, text = self._known, None if self._starts.is_expensive else self._text
        is_wanted = known is not None and text is not None and known.wants(text, found)
        if found is None and not is_wanted:
            return
        self.narrow(words)
        self.mask = Mask(words.copy(), self._vocab_size)
        self._run, self._num_left = (None, 0) if found is None else found
        if known is not None and text is not None and is_wanted:
            self._node = Node(text, self.mask, found, self.spelling_state, may_break=may_break, ended=self.ended)
            known.add(self._node, self._last, b"" if found is not None else forced())
            if self._left is not None and self._before is not None and self._last is not None:
                known.connect(self._left, self._before, self._last, Place(self._node, self._num_left, text))

    @property
    def is_out_of_runs(self) -> bool:
        """Whether the text is known to be within no run."""
        return self._text is not None and not self._text.blanks and not self._text.is_in_string

    @property
    def is_blank(self) -> bool:
        """Whether the text is known to end in whitespace, between two tokens of JSON."""
        if self._text is not None:
            return self._text.blanks > 0
        if self.finder is None or self._last is None:
            return False
        runs = self.finder.runs
        return self._last in runs.ends_in_break or (self._may_break and runs.whitespace.num_characters[self._last] > 0)

    def _stays(self, token_id: int) -> bool:
        """Whether this token is within the run, which goes on behind it.

        A run's last character may be followed by one text alone, of which masks allow the tokens that encode() gives:
        that mask does not follow from the run's.
        """
        run, left = self._run, self._num_left
        num = 0 if run is None else run.num_characters[token_id]
        if not 0 < num < left:
            return False
        if left != UNLIMITED:
            self._num_left = left - num
        if self._text is not None:
            self._inside.append(token_id)
        return True

    def _goes_on(self, token_id: int) -> bool:
        """Whether the mask behind this token is known, which leads out of the run, if it is in any."""
        run, node, left = self._run, self._node, self._num_left
        place, before = None, self._text
        if before is None or self._starts.is_expensive:
            self._text = self._left = None
        else:
            self._left, place = node, None if node is None else node.after.get(token_id)
            if place is not None:
                if run is not None and left != UNLIMITED and not self._allows(token_id):
                    place = self._text = None
                else:
                    self._enter(place)
                    self._text = place.text_after(before.frames)
                    return True
            elif self._allows(token_id):
                place = self._move(token_id)
            else:
                self._text = None
        if place is None:
            self.mask = self._run = self._node = None
            return False
        self._enter(place)
        return True

    def _allows(self, token_id: int) -> bool:
        """Whether the mask that next_mask() has given does. If not, what is known says nothing of what follows."""
        assert self.mask is not None
        place, bit, run = token_id >> 5, token_id & 31, self._run
        if run is not None and self._num_left != UNLIMITED and not run.within[self._num_left][place] >> bit & 1:
            return False
        return bool(self.mask.words[place] >> bit & 1)

    def _move(self, token_id: int) -> Place | None:
        """Behind this token; returns the place there, if it is known."""
        known, text, inside = self._known, self._text, self._inside
        if known is None or text is None or self._starts.is_expensive:
            self._text = None
            return None
        piece = known.pieces[token_id]
        self._before = text
        self._text = text = known.rules.after(text, b"".join([known.pieces[i] for i in inside]) + piece)
        inside.clear()
        place = None if text is None else known.find(text, token_id)
        if place is not None and self._left is not None:
            known.connect(self._left, self._before, token_id, place)
        return place

    def next_mask(self) -> tuple[Words, Words | None]:
        """Of a matcher with a mask: this, and if it is more than the run's length leaves, one that takes away the rest.
        To be asked once for each draw."""
        assert self.mask is not None, "the next mask is to be walked"
        if self._is_new:
            self._is_new = False
            self._done.append(FILLED)
        run, left = self._run, self._num_left
        return self.mask.words, None if run is None or left == UNLIMITED else run.within[left]

    def derive(self, words: Words) -> None:
        """Set the mask that next_mask() gives."""
        known, within = self.next_mask()
        if within is None:
            words[:] = known
        else:
            np.bitwise_and(known, within, out=words)

    def narrow(self, words: Words) -> None:
        """Take away what fill_all() has left in though it does not keep to the spelling."""
        if self.spelling is not None:
            words &= self.spelling.allowed[self.spelling_state][: len(words)]
