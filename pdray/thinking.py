"""A model's thoughts, <think>…</think>, as its tokens show them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import msgspec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BEGIN, END = "<think>", "</think>"
REASONING_OFF = "none"  # of Config.reasoning_parser


class Thinking(msgspec.Struct, frozen=True):
    """What an engine needs to know of a request's thoughts; a wire type as it stands.

    Attributes:
        begin, end: the tags' token ids.
        num_open: tokens of the prompt behind a tag that it leaves open; None: no thoughts are open.
    """

    begin: int
    end: int
    num_open: int | None = None


class ThinkTags(NamedTuple):
    """The tags' token ids."""

    begin: int
    end: int

    def after(self, prompt_token_ids: Sequence[int]) -> Thinking:
        """What is known behind a prompt."""
        last = {token_id: place for place, token_id in enumerate(prompt_token_ids) if token_id in self}
        opened, closed = last.get(self.begin, -1), last.get(self.end, -1)
        return Thinking(*self, len(prompt_token_ids) - 1 - opened if opened > closed else None)


def think_tags(tokenizer: PreTrainedTokenizerBase | None) -> ThinkTags | None:
    """None if a tag is several tokens: a text may then be cut into others, and nobody would see it."""
    if tokenizer is None:
        return None
    vocabulary = tokenizer.get_added_vocab()
    begin, end = vocabulary.get(BEGIN), vocabulary.get(END)
    return None if begin is None or end is None else ThinkTags(begin, end)


def thinks(template: str) -> bool:
    """Whether a model with this chat template writes its thoughts between think tags."""
    return BEGIN in template or END in template


def has_thoughts(reasoning_parser: str, template: str) -> bool:
    """Whether the model's thoughts are told apart from its answer.

    Args:
        reasoning_parser: see Config.
    """
    return thinks(template) if reasoning_parser == "auto" else reasoning_parser != REASONING_OFF
