"""A compiled grammar, and how far one output has come in it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import llguidance
import numpy as np

from pdray.engine.grammar.lengths import StringLimits
from pdray.engine.grammar.spelling import PLAIN, Spelling
from pdray.engine.grammar.starts import Starts

Words = np.ndarray[Any, np.dtype[np.int32]]  # one bit a token, 32 a word, the lowest first
FILLED = -1


class GrammarError(Exception):
    """An output cannot go on under its grammar."""


def num_words(vocab_size: int) -> int:
    """Words that hold a bit for each token."""
    return -(-vocab_size // 32)


class Grammar(NamedTuple):
    """What a compiler makes, for all requests with the same parameters.

    Attributes:
        starts: of the outputs that follow it.
        special: see TokenPieces.
        spelling: of JSON; None for other texts.
        limits: of its strings, where masks within these follow from earlier ones.
    """

    starts: Starts
    vocab_size: int
    special: frozenset[int]
    spelling: Spelling | None = None
    limits: StringLimits | None = None

    def matcher(self, token_ids: Iterable[int] = ()) -> GrammarMatcher:
        """One that has taken these tokens.

        Raises:
            GrammarError: they do not begin any text of the grammar.
        """
        matcher = GrammarMatcher(self.starts, self.vocab_size, self.spelling, self.limits)
        for token_id in token_ids:
            matcher.take(token_id)
        return matcher

    def empty_mask(self) -> Words:
        """Room for GrammarMatcher.fill()."""
        return np.zeros(num_words(self.vocab_size + 1), dtype=np.int32)

    def has_text(self) -> bool:
        """Whether a first token is allowed."""
        words = self.empty_mask()
        self.matcher().fill(words)
        words[self.vocab_size // 32] &= (1 << self.vocab_size % 32) - 1  # the end's bit, and those after it
        return bool(words.any())


class GrammarMatcher:
    """One output's place in its grammar. For one thread at a time.

    Attributes:
        ended: the text is complete, and nothing can follow it.
        error: first line of why it cannot go on; empty while it can.
        spelling, spelling_state: see Spelling.
    """

    def __init__(
        self, starts: Starts, vocab_size: int, spelling: Spelling | None, limits: StringLimits | None = None
    ) -> None:
        self._starts, self._num_words = starts, num_words(vocab_size + 1)
        self._start = starts.choose()
        if self._start is None:
            self._matcher = starts.alone()
        else:
            self._matcher = self._start.matcher.deep_copy()
            self._start.users.add(self)
        self.spelling, self.spelling_state = spelling, PLAIN
        self.limits = limits
        self._base: Words | None = None  # an earlier mask of the string that the text is in
        self._num_left = 0  # characters of it, if there is a base
        self._done: list[int] = []  # so far: tokens taken, and FILLED
        self._told: int | None = None  # by take_all(), and not yet by take()
        self.ended = bool(self._matcher.is_stopped())
        self.error = ""

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
            take_all([self], [token_id], None)
        assert self._told == token_id, "take_all() was told another token"
        self._told = None
        if self.error:
            raise GrammarError(self.error)
        if self.spelling is not None:
            state = self.spelling.after(self.spelling_state, token_id)
            if state is None:
                self.error = "a character of a JSON string is spelled in an unusual way"
                raise GrammarError(self.error)
            self.spelling_state = state

    def begin(self, words: Words, num_left: int) -> None:
        """Derive the masks of the rest of this string from this one, which leaves so many characters to it."""
        self._base, self._num_left = words.copy(), num_left

    def _follow(self, token_id: int) -> None:
        """Go on in the string, or leave it."""
        num = 0 if self.limits is None else self.limits.lengths.num_characters[token_id]
        self._num_left -= num
        if not num or self._num_left < 1:  # where one text alone is left masks follow the tokenizer, too
            self._base = None

    def _derive(self, words: Words) -> None:
        assert self._base is not None and self.limits is not None, "no mask of this string is known"
        np.bitwise_and(self._base, self.limits.lengths.within[self._num_left], out=words)

    def narrow(self, words: Words) -> None:
        """Take away what fill_all() has left in though it does not keep to the spelling."""
        if self.spelling is not None:
            words &= self.spelling.allowed[self.spelling_state][: len(words)]

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
        words = np.zeros(self._num_words, dtype=np.int32)
        for done in self._done:
            if done == FILLED:
                self._matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
            else:
                self._matcher.consume_token(done)
        return True


def take_all(
    matchers: Sequence[GrammarMatcher], token_ids: Sequence[int], executor: llguidance.LLExecutor | None
) -> None:
    """Tell each matcher the token that its take() will be told next, which then only raises its error.

    Args:
        executor: threads to spread them over; None: the caller's own. Others run Python meanwhile.
    """
    if executor is not None and len(matchers) > 1:
        pairs = [(each._matcher, token_id) for each, token_id in zip(matchers, token_ids, strict=True)]
        taken = executor.consume_token_par(pairs)
    else:
        taken = [each._matcher.consume_token(token_id) for each, token_id in zip(matchers, token_ids, strict=True)]
    for each, token_id, is_taken in zip(matchers, token_ids, taken, strict=True):
        each._told = token_id
        if is_taken or each._refused(token_id):
            each._done.append(token_id)
            if each._base is not None:
                each._follow(token_id)
            each.ended = each._matcher.is_stopped()


class Fill(NamedTuple):
    """GrammarMatcher.fill() of several, but for narrow(): run(), which may be called on another thread, derive() beside
    it, then finish().

    Attributes:
        rows: of ``words``, one for each matcher.
        executor: threads to spread them over; None: the caller's own. Others run Python meanwhile.
        walked, derived: places in ``matchers``, by how their masks are computed.
    """

    matchers: Sequence[GrammarMatcher]
    words: Words
    rows: Sequence[int]
    executor: llguidance.LLExecutor | None
    walked: list[int]
    derived: list[int]

    @classmethod
    def of(
        cls,
        matchers: Sequence[GrammarMatcher],
        words: Words,
        executor: llguidance.LLExecutor | None,
        rows: Sequence[int],
    ) -> Fill:
        assert words.flags.c_contiguous and words.dtype == np.int32
        walked, derived = [], []
        for i, matcher in enumerate(matchers):
            (walked if matcher._base is None else derived).append(i)
        if executor is not None:  # those that take turns beside each other, where one thread comes to all of them
            walked.sort(key=lambda i: matchers[i].shared_with)
        return cls(matchers, words, rows, executor, walked, derived)

    def run(self) -> None:
        """Walk the vocabulary for the masks that need it."""
        address, size = self.words.ctypes.data, self.words.shape[1] * 4
        pairs = [(self.matchers[i]._matcher, self.rows[i]) for i in self.walked]
        if self.executor is not None and len(pairs) > 1:
            self.executor.unsafe_compute_mask_ptr(pairs, address, size, len(self.words))
        else:
            for matcher, row in pairs:
                matcher.unsafe_compute_mask_ptr(address + row * size, size)
        self._begin_strings()

    def _begin_strings(self) -> None:
        """Where a string's end is near, let the masks of its rest be derived. (Of errors, masks have no strings.)"""
        limited: dict[int, list[int]] = {}
        for i in self.walked:
            if self.matchers[i].limits is not None:
                limited.setdefault(id(self.matchers[i].limits), []).append(i)
        for places in limited.values():
            limits, rows = self.matchers[places[0]].limits, [self.rows[i] for i in places]
            assert limits is not None
            for i, num_left in zip(places, limits.left(self.words, rows), strict=True):
                if num_left:
                    self.matchers[i].begin(self.words[self.rows[i]], num_left)

    def derive(self) -> None:
        """Compute the others."""
        for i in self.derived:
            self.matchers[i]._derive(self.words[self.rows[i]])

    def finish(self) -> None:
        """See to those that could not go on as they were. Whose ``error`` is set then, has no mask."""
        starts = {start for start in {each._start for each in self.matchers} if start is not None}
        spent = {start for start in starts if start.is_spent()}
        walked = [(self.matchers[i], self.rows[i]) for i in self.walked]
        if spent or any([each._matcher.is_error() for each, _ in walked]):
            for each, row in walked:
                each._check_filled(self.words[row], each._start in spent)
        for each, _ in walked:
            each._done.append(FILLED)


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
