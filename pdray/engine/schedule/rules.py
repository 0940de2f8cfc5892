"""Rules of sampling that look at a sequence's history: each is told every token, and changes how the next is drawn.

A rule belongs to one sequence. Rules are made when the sequence first draws, from all tokens that it has by then, so a
replay, a fork and a preempted sequence need nothing of their own.
"""

from __future__ import annotations

from collections.abc import Callable

from pdray.engine.grammar.matcher import Words
from pdray.engine.schedule.masks import AllowedTokens, BadWords, GrammarRule, set_bits
from pdray.engine.schedule.rule import History, Rule
from pdray.kernels.sampling.metadata import SamplingRow
from pdray.sampling_params import SamplingParams

__all__ = ["RULES", "History", "Rule", "make_rules"]


class Penalties(Rule):
    """Repetition, presence and frequency penalties; see pdray.kernels.sampling.sample.apply_penalties."""

    def __init__(self, history: History) -> None:
        self._prompt_token_ids, self._output_token_ids = history.prompt_token_ids, history.output_token_ids

    def told(self, token_id: int) -> None:
        """See Rule."""
        self._output_token_ids.append(token_id)

    def change(self, row: SamplingRow) -> SamplingRow:
        """See Rule."""
        return row._replace(prompt_token_ids=self._prompt_token_ids, output_token_ids=self._output_token_ids)

    @staticmethod
    def make(history: History) -> Rule | None:
        """The rule for a request with penalties; None without."""
        p = history.params
        used = (p.repetition_penalty, p.presence_penalty, p.frequency_penalty) != (1.0, 0.0, 0.0)
        return Penalties(history) if used else None


class MinTokens(Rule):
    """Bans what would end the sequence before min_tokens, unless a grammar leaves nothing else."""

    needs_tokens = False

    def __init__(self, history: History) -> None:
        self._min_tokens, self._end_token_ids = history.params.min_tokens, history.end_token_ids
        self._is_in_mask = has_mask(history.params)

    def narrow(self, words: Words, position: int) -> None:
        """See Rule."""
        if position < self._min_tokens:
            narrowed = words.copy()
            set_bits(narrowed, self._end_token_ids, False)
            if narrowed.any():
                words[:] = narrowed

    def change(self, row: SamplingRow) -> SamplingRow:
        """See Rule."""
        if self._is_in_mask or row.position >= self._min_tokens:
            return row
        return row._replace(banned_token_ids=(*row.banned_token_ids, *self._end_token_ids))

    @staticmethod
    def make(history: History) -> Rule | None:
        """The rule for a request with min_tokens; None without."""
        return MinTokens(history) if history.params.min_tokens else None


# In the order in which they are asked.
RULES: list[Callable[[History], Rule | None]] = [
    Penalties.make,
    GrammarRule.make,
    AllowedTokens.make,
    BadWords.make,
    MinTokens.make,
]


def has_mask(params: SamplingParams) -> bool:
    """Whether the request says which tokens may be drawn."""
    return (
        params.structured_outputs is not None
        or params.allowed_token_ids is not None
        or len(params.bad_words_token_ids) > 0
    )


def make_rules(history: History) -> list[Rule]:
    """The rules that a request's parameters ask for; none for most."""
    return [rule for make in RULES if (rule := make(history)) is not None]
