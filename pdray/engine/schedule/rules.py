"""Rules of sampling: which tokens a sequence may draw next, by the tokens that it has.

A rule belongs to one sequence. Rules are made when the sequence first draws, from all tokens that it has by then, so a
replay, a fork and a preempted sequence need nothing of their own. What they say becomes a mask, which is filled when
the last token is known, while the device already computes the step that draws the next one; see Engine. Where a
sequence has any rule, all its bans are in its mask. Penalties, logit_bias and min_tokens by itself are no rules: the
device keeps what they need (pdray/engine/step/histories.py).
"""

from __future__ import annotations

from collections.abc import Callable

from pdray.engine.grammar.matcher import Words
from pdray.engine.schedule.masks import AllowedTokens, BadWords, GrammarRule
from pdray.engine.schedule.rule import History, Rule, set_bits
from pdray.engine.schedule.thoughts import ThinkingBudget

__all__ = ["RULES", "History", "MinTokens", "Rule", "make_rules"]

# In the order in which they are asked.
RULES: list[Callable[[History], Rule | None]] = [GrammarRule.make, AllowedTokens.make, BadWords.make]


class MinTokens(Rule):
    """Bans what would end the sequence before min_tokens, unless the rules before it leave nothing else."""

    def __init__(self, history: History) -> None:
        self._min_tokens, self._end_token_ids = history.params.min_tokens, history.end_token_ids

    def narrow(self, words: Words, position: int) -> None:
        """See Rule."""
        if position < self._min_tokens:
            narrowed = words.copy()
            set_bits(narrowed, self._end_token_ids, False)
            if narrowed.any():
                words[:] = narrowed


def make_rules(history: History) -> list[Rule]:
    """The rules that a request's parameters ask for; none for most."""
    rules = [rule for make in RULES if (rule := make(history)) is not None]
    budget = ThinkingBudget.make(history)
    if (rules or budget) and history.params.min_tokens:
        rules.append(MinTokens(history))
    return rules if budget is None else [*rules, budget]
