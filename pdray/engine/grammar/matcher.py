"""A compiled grammar, and how far one output has come in it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import llguidance
import numpy as np

from pdray.engine.grammar.runs import UNLIMITED, Found, Run, RunFinder
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
        finder: of JSON's strings and whitespace, in which masks follow from earlier ones; None: they never do.
    """

    starts: Starts
    vocab_size: int
    special: frozenset[int]
    spelling: Spelling | None = None
    finder: RunFinder | None = None

    def matcher(self, token_ids: Iterable[int] = ()) -> GrammarMatcher:
        """One that has taken these tokens.

        Raises:
            GrammarError: they do not begin any text of the grammar.
        """
        matcher = GrammarMatcher(self.starts, self.vocab_size, self.spelling, self.finder)
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
        self, starts: Starts, vocab_size: int, spelling: Spelling | None, finder: RunFinder | None = None
    ) -> None:
        self._starts, self._num_words = starts, num_words(vocab_size + 1)
        self._start = starts.choose()
        if self._start is None:
            self._matcher = starts.alone()
        else:
            self._matcher = self._start.matcher.deep_copy()
            self._start.users.add(self)
        self.spelling, self.spelling_state = spelling, PLAIN
        self.finder = finder
        self._last: int | None = None  # token taken
        self._may_break = False  # before it
        self._run: Run | None = None  # that the text is in, where a mask of it is known: self._base
        self._base: Words | None = None
        self._num_left = 0  # characters of the run
        self._untold: list[int] = []  # tokens of the run, of which self._matcher has not heard yet
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
            take_all([self], [token_id])
        assert self._told == token_id, "take_all() was told another token"
        self._told = None
        if self._run is not None:
            return
        if self.error:
            raise GrammarError(self.error)
        if self.spelling is not None:
            state = self.spelling.after(self.spelling_state, token_id)
            if state is None:
                self.error = "a character of a JSON string is spelled in an unusual way"
                raise GrammarError(self.error)
            self.spelling_state = state

    def begin_run(self, found: Found, words: Words) -> None:
        """Narrow this mask, and derive those of the rest of the run from it."""
        self.narrow(words)
        self._run, self._num_left, self._base = found.run, found.num_left, words.copy()

    @property
    def is_blank(self) -> bool:
        """Whether the text is known to end in whitespace, between two tokens of JSON."""
        if self.finder is None or self._last is None:
            return False
        runs = self.finder.runs
        return self._last in runs.ends_in_break or (self._may_break and runs.whitespace.num_characters[self._last] > 0)

    @property
    def is_within(self) -> bool:
        """Whether the next mask is derived from an earlier one, narrow() included."""
        return self._run is not None

    def _goes_on(self, token_id: int) -> bool:
        """Whether the run goes on behind this token. Its last character may be followed by one text alone, of which
        masks allow the tokens that encode() gives: not to be derived."""
        num = 0 if self._run is None else self._run.num_characters[token_id]
        if not 0 < num < self._num_left:
            self._run = self._base = None
            return False
        if self._num_left != UNLIMITED:
            self._num_left -= num
        return True

    @property
    def same_mask(self) -> Words | None:
        """The next mask, narrow() included, where it is one that was derived before: the same array as then."""
        return self._base if self._num_left == UNLIMITED else None

    def derive(self, words: Words) -> None:
        """Set the next mask, if the text is_within()."""
        assert self._run is not None and self._base is not None, "no mask of this run is known"
        if self._num_left == UNLIMITED:
            words[:] = self._base
        else:
            np.bitwise_and(self._base, self._run.within[self._num_left], out=words)

    def _consume(self, token_id: int) -> bool:
        untold, self._untold = self._untold, []
        return self._matcher.consume_tokens([*untold, token_id]) if untold else self._matcher.consume_token(token_id)

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


def take_all(matchers: Sequence[GrammarMatcher], token_ids: Sequence[int]) -> None:
    """Tell each matcher the token that its take() will be told next, which then only raises its error.

    On the caller's thread: a token takes 2 us, and other threads would have to be woken first.
    """
    for each, token_id in zip(matchers, token_ids, strict=True):
        each._told = each._last = token_id
        if each._run is not None and each._goes_on(token_id):
            each._untold.append(token_id)
            each._done.append(token_id)
        elif each._consume(token_id) or each._refused(token_id):
            each._done.append(token_id)
            each.ended = each._matcher.is_stopped()


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
            (walked if matcher._run is None else derived).append(i)
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
            if each.finder is not None and not each.error:
                by_finder.setdefault(id(each.finder), (each.finder, []))[1].append((each, row))
        for finder, several in by_finder.values():
            rows = [row for _, row in several]
            found = finder.find(self.words, rows, [each.is_blank for each, _ in several])
            for (each, row), one, may_break in zip(several, found, finder.may_break(self.words, rows), strict=True):
                each._may_break = may_break
                if one is not None:
                    each.begin_run(one, self.words[row])


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
