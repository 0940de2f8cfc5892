"""What a rule of sampling is: it is told every token of one sequence, and changes how the next is drawn."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import Future
from typing import NamedTuple

from pdray.engine.grammar.matcher import Grammar, Words
from pdray.kernels.sampling.metadata import SamplingRow
from pdray.sampling_params import SamplingParams


class History(NamedTuple):
    """What a rule is made from.

    Attributes:
        output_token_ids: so far; a copy, which the rule may keep.
        end_token_ids: end-of-sequence and stop token ids of the request.
        grammar: of params.structured_outputs; it has been compiled when something is drawn.
    """

    params: SamplingParams
    prompt_token_ids: Sequence[int]
    output_token_ids: list[int]
    end_token_ids: tuple[int, ...]
    grammar: Future[Grammar] | None = None


class Rule(ABC):
    """See the module.

    Attributes:
        needs_tokens: every token must be known before the step that draws the next one is planned.
        masks: every token must be known before the next one is drawn, which narrow() has a word in.
    """

    needs_tokens = True
    masks = False

    def told(self, token_id: int) -> None:
        """The sequence has this token now."""
        return

    @property
    def ended(self) -> bool:
        """Whether nothing may follow the tokens told."""
        return False

    @abstractmethod
    def change(self, row: SamplingRow) -> SamplingRow:
        """How the next token is drawn: ``row`` with more banned tokens, or with what else a row can say."""

    def narrow(self, words: Words, position: int) -> None:
        """Take away the bits of tokens that must not be the output's token at this position.

        Called of all rules of a sequence that has one that masks, in their order.
        """
        return
