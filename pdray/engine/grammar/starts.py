"""Where outputs that follow one grammar begin: compiled matchers that have taken nothing.

llguidance derives a grammar's states as they are met. Copies of one matcher share them, and take turns; a matcher that
was compiled anew knows none. So outputs with equal parameters share a few matchers, as many as keep the threads that
fill masks out of each other's way. What they share is bounded. Where it grows beyond that the grammar is expensive: its
outputs go on alone, each with a matcher of its own that has done what it would have done without the others, and so
none of them ends because of another.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import llguidance
import numpy as np

OUTPUTS_PER_START = 4  # beyond, another start is compiled


class Start:
    """A matcher that has taken nothing, and never does.

    Attributes:
        users: outputs that share what it has derived.
    """

    def __init__(self, matcher: llguidance.LLMatcher) -> None:
        self.matcher = matcher
        self.users: weakref.WeakSet[Any] = weakref.WeakSet()
        probe = matcher.deep_copy()
        bits = np.unpackbits(np.frombuffer(probe.compute_bitmask(), np.uint8), bitorder="little")
        self._token_id = None if probe.is_error() else int(bits.argmax())  # one that may come first

    def is_spent(self) -> bool:
        """Whether its copies cannot go on, whatever they have taken: what is shared has become too much.

        A mask that leaves one token may not tell. To take a token always does.
        """
        return self._token_id is None or not self.matcher.deep_copy().consume_token(self._token_id)


class Starts:
    """Of one grammar.

    Args:
        first: compiled already, to be shared; where nothing is, for the first output.
        compile_one: compiles another on the compiler's thread: one to share, or one for a single output.
        most: to be shared; 0: the grammar is expensive.

    Attributes:
        is_expensive: nothing is shared any more.
    """

    def __init__(
        self,
        first: llguidance.LLMatcher,
        compile_one: Callable[[bool], Future[llguidance.LLMatcher]],
        most: int,
    ) -> None:
        self._compile_one, self._most = compile_one, most
        self.is_expensive = most == 0
        self._shared = [] if self.is_expensive else [Start(first)]
        self._num_wanted, self._num_expected = len(self._shared), 0
        self._spare: Future[llguidance.LLMatcher] | None = None
        if self.is_expensive:
            self._spare = Future()
            self._spare.set_result(first)

    def expect(self) -> None:
        """An output will begin: compile what it will need beside what others need. Any thread, one at a time."""
        self._num_expected += 1
        if self.is_expensive:
            self._spare = self._spare or self._compile_one(False)
            return
        num_outputs = self._num_expected + sum(len(start.users) for start in self._shared)
        if self._num_wanted < min(self._most, -(-num_outputs // OUTPUTS_PER_START)):
            self._num_wanted += 1
            self._compile_one(True).add_done_callback(self._add)

    def _add(self, compiled: Future[llguidance.LLMatcher]) -> None:
        self._shared.append(Start(compiled.result()))

    def choose(self) -> Start | None:
        """The start that fewest outputs share; None: this output goes alone."""
        self._num_expected = max(0, self._num_expected - 1)
        return None if self.is_expensive else min(self._shared, key=lambda start: len(start.users))

    def alone(self) -> llguidance.LLMatcher:
        """A matcher for one output. Waits for the compiler if it was not expected."""
        compiled, self._spare = self._spare or self._compile_one(False), None
        return compiled.result()

    def note_failure(self, start: Start) -> None:
        """An output that shares this start has failed, by its own fault or by what is shared."""
        if not self.is_expensive and start.is_spent():
            self.is_expensive = True
            self._shared.clear()
