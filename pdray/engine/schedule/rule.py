"""What a rule of sampling is: it is told every token of one sequence, and says which may come next."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from concurrent.futures import Future
from typing import NamedTuple

import numpy as np

from pdray.engine.grammar.grammar import Grammar
from pdray.engine.grammar.matcher import Words
from pdray.sampling_params import SamplingParams


class History(NamedTuple):
    """What a rule is made from.

    Attributes:
        output_token_ids: so far; a copy, which the rule may keep.
        end_token_ids: end-of-sequence and stop token ids of the request.
        grammar: of params.structured_outputs; it has been compiled when something is drawn.
    """

    params: SamplingParams
    output_token_ids: list[int]
    end_token_ids: tuple[int, ...]
    grammar: Future[Grammar] | None = None


class Rule(ABC):
    """See the module."""

    def told(self, token_id: int) -> None:
        """The sequence has this token now."""
        return

    @property
    def ended(self) -> bool:
        """Whether nothing may follow the tokens told."""
        return False

    @abstractmethod
    def narrow(self, words: Words, position: int) -> None:
        """Take away the bits of tokens that must not be the output's token at this position.

        Called of all rules of a sequence, in their order, when all tokens before the position have been told.
        """


def set_bits(words: Words, token_ids: Iterable[int], value: bool) -> None:
    """Allow or ban some tokens."""
    unsigned = words.view(np.uint32)
    for token_id in token_ids:
        bit = np.uint32(1 << token_id % 32)
        if value:
            unsigned[token_id // 32] |= bit
        else:
            unsigned[token_id // 32] &= ~bit
