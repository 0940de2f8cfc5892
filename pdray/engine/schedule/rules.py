"""Rules of sampling that look at a sequence's history: each is told every token, and changes how the next is drawn.

A rule belongs to one sequence. Rules are made when the sequence first draws, from all tokens that it has by then, so a
replay, a fork and a preempted sequence need nothing of their own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple

from pdray.kernels.sampling.metadata import SamplingRow
from pdray.sampling_params import SamplingParams


class History(NamedTuple):
    """The facts that a rule is made from.

    Attributes:
        output_token_ids: so far; a copy, which the rule may keep.
        end_token_ids: end-of-sequence and stop token ids of the request.
    """

    params: SamplingParams
    prompt_token_ids: Sequence[int]
    output_token_ids: list[int]
    end_token_ids: tuple[int, ...]


class Rule(ABC):
    """See the module.

    Attributes:
        needs_tokens: every token must be known before the next one is drawn; False: their number is enough.
    """

    needs_tokens = True

    def told(self, token_id: int) -> None:
        """The sequence has this token now."""
        return

    @abstractmethod
    def change(self, row: SamplingRow) -> SamplingRow:
        """Change how the next token is drawn: return ``row`` with more banned tokens, or other fields."""


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
    """Bans what would end the sequence before min_tokens."""

    needs_tokens = False

    def __init__(self, min_tokens: int, end_token_ids: tuple[int, ...]) -> None:
        self._min_tokens, self._end_token_ids = min_tokens, end_token_ids

    def change(self, row: SamplingRow) -> SamplingRow:
        """See Rule."""
        if row.position >= self._min_tokens:
            return row
        return row._replace(banned_token_ids=(*row.banned_token_ids, *self._end_token_ids))

    @staticmethod
    def make(history: History) -> Rule | None:
        """The rule for a request with min_tokens; None without."""
        min_tokens = history.params.min_tokens
        return MinTokens(min_tokens, history.end_token_ids) if min_tokens else None


# In the order in which they are asked.
RULES: list[Callable[[History], Rule | None]] = [Penalties.make, MinTokens.make]


def make_rules(history: History) -> list[Rule]:
    """The rules that a request's parameters ask for; none for most."""
    return [rule for make in RULES if (rule := make(history)) is not None]
