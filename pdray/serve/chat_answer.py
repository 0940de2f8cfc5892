"""Parts of an answer as a chat message, whole or in deltas, in OpenAI's shapes."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

from pdray.serve.parsers.answer import AnswerFormat
from pdray.serve.parsers.events import CallArguments, CallStart, Event, Reasoning, Text


def new_call_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"


class ChatStream:
    """One completion's deltas.

    Args:
        include_reasoning: give thoughts out.
    """

    def __init__(self, how: AnswerFormat, *, include_reasoning: bool) -> None:
        self._parser = how.parser()
        self._include_reasoning = include_reasoning
        self._index = -1  # of the current call

    def deltas(self, text: str, finish_reason: str | None) -> list[dict[str, Any]]:
        """What a piece of text adds, the last one with a finish_reason."""
        events = self._parser.feed(text) if text else []
        if finish_reason is not None:
            events = events + self._parser.finish()
        return [delta for event in events if (delta := self._delta(event)) is not None]

    def finish_reason(self, reason: str | None) -> str | None:
        """What the client is told."""
        return self._parser.finish_reason(reason)

    def _delta(self, event: Event) -> dict[str, Any] | None:
        match event:
            case Text(text):
                return {"content": text}
            case Reasoning(text) if self._include_reasoning:
                return {"reasoning_content": text, "reasoning": text}
            case CallStart(name):
                self._index += 1
                function = {"name": name, "arguments": ""}
                call = {"index": self._index, "id": new_call_id(), "type": "function", "function": function}
                return {"tool_calls": [call]}
            case CallArguments(text):
                return {"tool_calls": [{"index": self._index, "function": {"arguments": text}}]}
        return None


def whole_message(deltas: Sequence[dict[str, Any]], *, echo: str) -> dict[str, Any]:
    """The message that the deltas add up to. Its content is null where there are thoughts or calls and no text."""
    content, reasoning, calls = [echo], [], []
    for delta in deltas:
        content.append(delta.get("content", ""))
        reasoning.append(delta.get("reasoning_content", ""))
        for call in delta.get("tool_calls", ()):
            if "id" in call:
                calls.append({"id": call["id"], "type": "function", "function": dict(call["function"])})
            else:
                calls[-1]["function"]["arguments"] += call["function"]["arguments"]
    thoughts = "".join(reasoning)
    text = "".join(content)
    message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
    if not text and (calls or thoughts):
        message["content"] = None
    if thoughts:
        message |= {"reasoning_content": thoughts, "reasoning": thoughts}
    if calls:
        message["tool_calls"] = calls
    return message
