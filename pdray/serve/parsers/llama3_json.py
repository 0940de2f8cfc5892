"""{"name": …, "parameters": {…}} as the whole answer: Llama 3. Several are separated by semicolons."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

from pdray.serve.parsers.call_object import CallObject
from pdray.serve.parsers.content import Content
from pdray.serve.parsers.events import CallEnd, Event, joined
from pdray.serve.parsers.json_value import SPACE

TAG = "<|python_tag|>"  # may come first; it is a special token, and so usually no text

State = Literal["start", "call", "after", "text"]


class Llama3JsonParser:
    """An answer that begins otherwise is all text, and what follows the calls is."""

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self._content = Content()
        self._state: State = "start"
        self._held = ""  # before a call, while it is open whether there is one
        self._call = CallObject(names)
        self._num_calls = 0

    def feed(self, text: str) -> list[Event]:
        events: list[Event] = []
        at = 0
        while at < len(text):
            match self._state:
                case "start" | "after":
                    at = self._before_call(text, at, events)
                case "call":
                    at = self._in_call(text, at, events)
                case "text":
                    self._content.text(text[at:], events)
                    at = len(text)
        return joined(events)

    def _before_call(self, text: str, at: int, events: list[Event]) -> int:
        char = text[at]
        if char == "{" and self._may_call():
            self._state, self._call = "call", CallObject(self._names)
            return at
        held = (self._held + char).lstrip(SPACE)
        is_tag = self._state == "start" and TAG.startswith(held.rstrip(SPACE))
        is_separator = self._state == "after" and held.strip(SPACE) in ("", ";")
        if not (char in SPACE or is_tag or is_separator):
            self._give_up(events)
            return at
        self._held += char
        return at + 1

    def _may_call(self) -> bool:
        held = self._held.strip(SPACE)
        return held in ("", TAG) if self._state == "start" else held == ";"

    def _in_call(self, text: str, at: int, events: list[Event]) -> int:
        at = self._call.feed(text, at, events)
        if self._call.begun:
            self._held = ""
            self._content.call()
        if self._call.done:
            self._state = "after"
            self._num_calls += 1
        elif self._call.broken:
            self._give_up(events, self._call.held)
        return at

    def _give_up(self, events: list[Event], held: str = "") -> None:
        self._state = "text"
        self._content.text(self._held + held, events)
        self._held = ""

    def finish(self) -> list[Event]:
        events: list[Event] = []
        if self._state == "call" and self._call.has_arguments:
            events.append(CallEnd())
        elif self._state == "call":
            self._give_up(events, self._call.held)
        elif self._state == "start" or self._held.strip(SPACE) != ";":
            self._give_up(events)
        self._content.finish(events)
        return joined(events)
