"""<tool_call>{"name": …, "arguments": {…}}</tool_call>: Hermes, Qwen 2.5 and 3; with an array of calls, SmolLM2."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

from pdray.serve.parsers.call_list import CallList
from pdray.serve.parsers.content import Content, overlap
from pdray.serve.parsers.events import CallStart, Event, joined
from pdray.serve.parsers.json_value import SPACE

BEGIN, END = "<tool_call>", "</tool_call>"

State = Literal["text", "calls", "end"]


class HermesParser:
    """Calls may stand anywhere, with text between them. What is no call between the tags stays text, tags and all."""

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self._content = Content()
        self._state: State = "text"
        self._pending = ""  # may be the beginning of a tag
        self._calls = CallList(names)
        self._has_call = False  # since the last begin tag

    def feed(self, text: str) -> list[Event]:
        events: list[Event] = []
        text, self._pending = self._pending + text, ""
        at = 0
        while at < len(text):
            match self._state:
                case "text":
                    at = self._text(text, at, events)
                case "calls":
                    at = self._in_tags(text, at, events)
                case "end":
                    at = self._behind_calls(text, at, events)
        return joined(events)

    def _text(self, text: str, at: int, events: list[Event]) -> int:
        found = text.find(BEGIN, at)
        if found < 0:
            held = overlap(text[at:], BEGIN)
            self._pending = text[len(text) - held :]
            self._content.text(text[at : len(text) - held], events)
            return len(text)
        self._content.text(text[at:found], events)
        self._state, self._calls, self._has_call = "calls", CallList(self._names), False
        return found + len(BEGIN)

    def _in_tags(self, text: str, at: int, events: list[Event]) -> int:
        fresh: list[Event] = []
        at = self._calls.feed(text, at, fresh)
        self._note_calls(fresh, events)
        if self._calls.done:
            self._state = "end"
        elif self._calls.broken:
            self._break(events)
        return at

    def _note_calls(self, fresh: list[Event], events: list[Event]) -> None:
        if any(isinstance(event, CallStart) for event in fresh):
            self._has_call = True
            self._content.call()
        events += fresh

    def _break(self, events: list[Event]) -> None:
        """What was held is text, and so is what follows."""
        self._state = "text"
        self._content.text(("" if self._has_call else BEGIN) + self._calls.held, events)

    def _behind_calls(self, text: str, at: int, events: list[Event]) -> int:
        while at < len(text) and text[at] in SPACE:
            at += 1
        rest = text[at : at + len(END)]
        if rest == END:
            if not self._has_call:  # an empty array
                self._content.text(BEGIN + self._calls.held + END, events)
            self._state = "text"
            return at + len(END)
        if END.startswith(rest):
            self._pending = rest
            return len(text)
        if self._has_call:
            self._state = "text"
        else:
            self._break(events)
        return at

    def finish(self) -> list[Event]:
        events: list[Event] = []
        pending, self._pending = self._pending, ""
        if self._state == "calls":
            fresh: list[Event] = []
            self._calls.finish(fresh)
            self._note_calls(fresh, events)
            self._break(events)
        elif self._state == "end" and not self._has_call:
            self._break(events)
            self._content.text(pending, events)
        elif self._state == "text":
            self._content.text(pending, events)
        self._state = "text"
        self._content.finish(events)
        return joined(events)
