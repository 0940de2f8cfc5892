"""Calls that a grammar forces: the answer is an array of calls, or the arguments of one tool, and nothing else."""

from __future__ import annotations

from collections.abc import Collection

from pdray.serve.parsers.call_list import CallList
from pdray.serve.parsers.content import Content
from pdray.serve.parsers.events import CallArguments, CallEnd, CallStart, Event, joined
from pdray.serve.parsers.json_value import SPACE, JsonValue


class RequiredCallsParser:
    """[{"name": …, "parameters": {…}}, …]. What is cut before it is a call is no content."""

    def __init__(self, names: Collection[str]) -> None:
        self._calls = CallList(names)
        self._content = Content()

    def feed(self, text: str) -> list[Event]:
        events: list[Event] = []
        at = 0
        if not (self._calls.done or self._calls.broken):
            at = self._calls.feed(text, 0, events)
            if self._calls.broken:
                self._content.text(self._calls.held, events)
            elif self._calls.done:
                self._content.call()
        self._content.text(text[at:], events)
        return joined(events)

    def finish(self) -> list[Event]:
        events: list[Event] = []
        if not (self._calls.done or self._calls.broken):
            self._calls.finish(events)
        self._content.finish(events)
        return joined(events)


class NamedCallParser:
    """The arguments of one tool, a JSON object."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._value = JsonValue()
        self._content = Content()
        self._has_begun = self._is_text = False

    def feed(self, text: str) -> list[Event]:
        events: list[Event] = []
        if not self._has_begun and not self._is_text:
            text = text.lstrip(SPACE)
            self._is_text = bool(text) and text[0] != "{"
        if text and not (self._is_text or self._value.done or self._value.broken):
            end = self._value.feed(text)
            if not self._has_begun:
                self._has_begun = True
                self._content.call()
                events.append(CallStart(self._name))
            events.append(CallArguments(text[:end]))
            text = text[end:]
            if self._value.done:
                events.append(CallEnd())
        self._content.text(text, events)
        return joined(events)

    def finish(self) -> list[Event]:
        events: list[Event] = []
        self._content.finish(events)
        return joined(events)
