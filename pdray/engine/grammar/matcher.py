"""How far one output has come in its grammar."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import llguidance
import numpy as np

from pdray.engine.grammar.follower import FILLED, Follower
from pdray.engine.grammar.known_masks import KnownMasks
from pdray.engine.grammar.runs import RunFinder, Words
from pdray.engine.grammar.spelling import Spelling
from pdray.engine.grammar.starts import Starts


class GrammarError(Exception):
    """An output cannot go on under its grammar."""


def num_words(vocab_size: int) -> int:
    """Words that hold a bit for each token."""
    return -(-vocab_size // 32)


class GrammarMatcher(Follower):
    """One output's place in its grammar. For one thread at a time.

    Attributes:
        ended: the text is complete, and nothing can follow it.
        error: first line of why it cannot go on; empty while it can.
    """

    def __init__(
        self,
        starts: Starts,
        vocab_size: int,
        spelling: Spelling | None,
        finder: RunFinder | None = None,
        known: KnownMasks | None = None,
    ) -> None:
        super().__init__(starts, vocab_size, spelling, finder)
        self._start = starts.choose()
        if self._start is None:
            self._matcher = starts.alone()
        else:
            self._matcher = self._start.matcher.deep_copy()
            self._start.users.add(self)
        self._untold: list[int] = []  # tokens of which self._matcher has not heard yet
        self._told: int | None = None  # by take_all(), and not yet by take()
        self.ended = bool(self._matcher.is_stopped())
        self.error = ""
        if known is not None and self._start is not None:
            self._follow(known)

    @property
    def shared_with(self) -> int:
        """The same for matchers that take turns."""
        return id(self if self._start is None else self._start)

    def take(self, token_id: int) -> None:
        """The output has this token now; take_all() may have said so before.

        Raises:
            GrammarError: the grammar does not allow it, or has become too expensive.
        """
        if self._told is None:
            take_all([self], [token_id])
        assert self._told == token_id, "take_all() was told another token"
        self._told = None
        if self.mask is not None:
            return
        if self.error:
            raise GrammarError(self.error)
        if self.spelling is not None:
            state = self.spelling.after(self.spelling_state, token_id)
            if state is None:
                self.error = "a character of a JSON string is spelled in an unusual way"
                raise GrammarError(self.error)
            self.spelling_state = state

    def _consume(self, token_id: int) -> bool:
        untold, self._untold = self._untold, []
        return self._matcher.consume_tokens([*untold, token_id]) if untold else self._matcher.consume_token(token_id)

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

    def _refused(self, token_id: int) -> bool:
        """A token was not taken; whether it is after all."""
        is_taken = self._leave() and self._matcher.consume_token(token_id)
        if not is_taken:
            self._note_error()
        return is_taken

    def _check_filled(self, words: Words, is_spent: bool) -> None:
        if (is_spent or self._matcher.is_error()) and self._leave():
            self._matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        if self._matcher.is_error():
            self._note_error()

    def _note_error(self) -> None:
        self.error = str(self._matcher.get_error()).partition("\n")[0] or "the grammar cannot go on"

    def _leave(self) -> bool:
        """Go on alone if what is shared has become too expensive; returns whether that was so.

        With a matcher that has filled every mask and taken every token, as if it had never been shared.
        """
        if self._start is None:
            return False
        self._starts.note_failure(self._start)
        if not self._starts.is_expensive:
            return False
        self._start, self._matcher = None, self._starts.alone()
        self._text = self._left = None
        words = np.zeros(num_words(self._vocab_size + 1), dtype=np.int32)
        for done in self._done:
            if done == FILLED:
                self._matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
            else:
                self._matcher.consume_token(done)
        return True


def take_all(matchers: Sequence[GrammarMatcher], token_ids: Sequence[int]) -> None:
    """Tell each matcher the token that its take() will be told next, which then only raises its error.

    On the caller's thread: a token takes 2 us, and other threads would have to be woken first.
    """
    for each, token_id in zip(matchers, token_ids, strict=True):
        each._told = each._last = token_id
        place = None
        if each.mask is None:
            each._left = None
            place = each._move(token_id)
        elif each._stays(token_id) or each._goes_on(token_id):
            each._untold.append(token_id)
            each._done.append(token_id)
            continue
        if each._consume(token_id) or each._refused(token_id):
            each._done.append(token_id)
            each.ended = each._matcher.is_stopped()
            if place is not None and each._text is not None:
                each._enter(place)


class Fill(NamedTuple):
    """GrammarMatcher.fill() of several, but for narrow(): run(), which may be called on another thread, derive() beside
    it, then finish().

    Attributes:
        rows: of ``words``, one for each matcher.
        executor: threads to spread them over; None: the caller's own. Others run Python meanwhile.
        walked, derived: places in ``matchers``, by how their masks are computed.
        pairs: matchers and rows of those walked.
    """

    matchers: Sequence[GrammarMatcher]
    words: Words
    rows: Sequence[int]
    executor: llguidance.LLExecutor | None
    walked: list[int]
    derived: list[int]
    pairs: list[tuple[llguidance.LLMatcher, int]]

    @classmethod
    def of(
        cls,
        matchers: Sequence[GrammarMatcher],
        words: Words,
        executor: llguidance.LLExecutor | None,
        rows: Sequence[int],
    ) -> Fill:
        assert words.flags.c_contiguous and words.dtype == np.int32
        walked: list[int] = []
        derived: list[int] = []
        for i, matcher in enumerate(matchers):
            (walked if matcher.mask is None else derived).append(i)
        if executor is not None:  # those that take turns beside each other, where one thread comes to all of them
            walked.sort(key=lambda i: matchers[i].shared_with)
        pairs = [(matchers[i]._matcher, rows[i]) for i in walked]
        return cls(matchers, words, rows, executor, walked, derived, pairs)

    def run(self) -> None:
        """Walk the vocabulary for the masks that need it."""
        address, size = self.words.ctypes.data, self.words.shape[1] * 4
        if self.executor is not None and len(self.pairs) > 1:
            self.executor.unsafe_compute_mask_ptr(self.pairs, address, size, len(self.words))
        else:
            for matcher, row in self.pairs:
                matcher.unsafe_compute_mask_ptr(address + row * size, size)

    def derive(self) -> None:
        """Compute the others."""
        for i in self.derived:
            self.matchers[i].derive(self.words[self.rows[i]])

    def finish(self) -> None:
        """See to those that could not go on as they were. Whose ``error`` is set then, has no mask."""
        walked = [(self.matchers[i], self.rows[i]) for i in self.walked]
        starts = {start for start in {each._start for each, _ in walked} if start is not None}
        spent = {start for start in starts if start.is_spent()}
        if spent or any([matcher.is_error() for matcher, _ in self.pairs]):
            for each, row in walked:
                each._check_filled(self.words[row], each._start in spent)
        by_finder: dict[int, tuple[RunFinder, list[tuple[GrammarMatcher, int]]]] = {}
        for each, row in walked:
            each._done.append(FILLED)
            if each.error or each.finder is None:
                continue
            if each.is_out_of_runs:
                each.learn(self.words[row], None, each._matcher.compute_ff_bytes)
            else:
                by_finder.setdefault(id(each.finder), (each.finder, []))[1].append((each, row))
        for finder, several in by_finder.values():
            rows = [row for _, row in several]
            found = finder.find(self.words, rows, [each.is_blank for each, _ in several])
            for (each, row), one, may_break in zip(several, found, finder.may_break(self.words, rows), strict=True):
                each.learn(self.words[row], one, each._matcher.compute_ff_bytes, may_break=may_break)


def fill_all(
    matchers: Sequence[GrammarMatcher], words: Words, executor: llguidance.LLExecutor | None, rows: Sequence[int] = (0,)
) -> None:
    """GrammarMatcher.fill() of each, but for narrow(), into the row of words given for it. Whose ``error`` is set then,
    has no mask.
    """
    fill = Fill.of(matchers, words, executor, rows)
    fill.run()
    fill.derive()
    fill.finish()
