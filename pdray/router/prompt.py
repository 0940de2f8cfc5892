"""What a prompt may be besides a plain text or token ids."""

from __future__ import annotations


class CompleteText(str):
    """A text with all of its special tokens, such as a rendered conversation: the tokenizer adds none by itself."""

    __slots__ = ()
