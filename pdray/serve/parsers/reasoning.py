"""<think>thoughts</think>answer: DeepSeek R1, Qwen 3, QwQ."""

from __future__ import annotations

from typing import Literal

from pdray.serve.parsers.content import overlap
from pdray.serve.parsers.events import Event, Reasoning, Text, joined
from pdray.thinking import BEGIN, END

State = Literal["start", "thoughts", "gap", "answer"]


def ends_in_thoughts(prompt: str) -> bool:
    """Whether what follows the prompt are thoughts: its last tag opens them."""
    return prompt.rfind(BEGIN) > prompt.rfind(END)


def has_closed_thoughts(prompt: str) -> bool:
    """Whether what follows the prompt is the answer itself: thoughts, maybe none, are right before it."""
    return prompt.rstrip().endswith(END)


class ThinkParser:
    """Thoughts may only come first; tags elsewhere are text. Spaces beside the tags are neither thought nor answer.

    Args:
        thinking: the prompt has opened the thoughts already.
    """

    def __init__(self, *, thinking: bool) -> None:
        self._state: State = "thoughts" if thinking else "start"
        self._held = ""
        self._has_thoughts = False

    def feed(self, text: str) -> list[Event]:
        events: list[Event] = []
        text, self._held = self._held + text, ""
        if self._state == "start":
            stripped = text.lstrip()
            if stripped.startswith(BEGIN):
                self._state, text = "thoughts", stripped[len(BEGIN) :]
            elif BEGIN.startswith(stripped):
                self._held = text
                return []
            else:
                self._state = "answer"
        if self._state == "thoughts":
            text = self._thoughts(text, events)
        if self._state == "gap":
            text = text.lstrip()
            self._state = "answer" if text else "gap"
        if self._state == "answer":
            events.append(Text(text))
        return joined(events)

    def _thoughts(self, text: str, events: list[Event]) -> str:
        """Returns what follows them."""
        if not self._has_thoughts:
            text = text.lstrip()
        thoughts, tag, rest = text.partition(END)
        if not tag:
            thoughts = text[: len(text) - overlap(text, END)]
        shown = thoughts.rstrip()
        self._has_thoughts = self._has_thoughts or bool(shown)
        events.append(Reasoning(shown))
        if not tag:
            self._held = text[len(shown) :]
            return ""
        self._state = "gap"
        return rest

    def finish(self) -> list[Event]:
        held, self._held = self._held, ""
        return joined([Reasoning(held) if self._state == "thoughts" else Text(held)])
