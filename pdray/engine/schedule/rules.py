"""Rules of sampling that look at a sequence's history: each is told every token, and changes how the next is drawn.

A rule belongs to one sequence. Rules are made when the sequence first draws, from all tokens that it has by then, so a
replay, a fork and a preempted sequence need nothing of their own. Penalties and min_tokens are no rules: the device
keeps what they need (pdray/engine/step/histories.py).
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
        """How the next token is drawn: ``row`` with more banned tokens."""


# In the order in which they are asked; pdray itself has none.
RULES: list[Callable[[History], Rule | None]] = []


def make_rules(history: History) -> list[Rule]:
    """The rules that a request's parameters ask for; none for most."""
    return [rule for make in RULES if (rule := make(history)) is not None]
