"""A model's thoughts in an output: where they stand, and how long they may get."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from pdray.engine.grammar.matcher import Words
from pdray.engine.schedule.rule import History, Rule, set_bits
from pdray.thinking import Thinking


class Thoughts:
    """How far an output's thoughts have come. Once closed, they are not opened again: tags are text then.

    Attributes:
        is_open: the next token is one of them, or the tag that ends them.
        is_over: they have ended.
        num_tokens: so far, without the tags.
    """

    def __init__(self, thinking: Thinking) -> None:
        self._begin, self._end = thinking.begin, thinking.end
        self.is_open, self.is_over = thinking.num_open is not None, False
        self.num_tokens = thinking.num_open or 0

    def take(self, token_id: int) -> None:
        """The output's next token."""
        if self.is_over:
            return
        if not self.is_open:
            self.is_open = token_id == self._begin
        elif token_id == self._end:
            self.is_open, self.is_over = False, True
        else:
            self.num_tokens += 1


class ThinkingBudget(Rule):
    """Ends thoughts that have got as long as they may: the tag is all that may come next."""

    def __init__(self, thinking: Thinking, budget: int, output_token_ids: Iterable[int]) -> None:
        self._thoughts, self._end, self._budget = Thoughts(thinking), thinking.end, budget
        for token_id in output_token_ids:
            self._thoughts.take(token_id)

    def told(self, token_id: int) -> None:
        """See Rule."""
        self._thoughts.take(token_id)

    def narrow(self, words: Words, position: int) -> None:
        """See Rule; whatever other rules say."""
        if self._thoughts.is_open and self._thoughts.num_tokens >= self._budget:
            words[:] = np.int32(0)
            set_bits(words, [self._end], True)

    @staticmethod
    def make(history: History) -> Rule | None:
        """None without a budget."""
        params = history.params
        if params.thinking is None or params.thinking_token_budget is None:
            return None
        return ThinkingBudget(params.thinking, params.thinking_token_budget, history.output_token_ids)
