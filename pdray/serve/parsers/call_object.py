"""A tool call written as a JSON object, {"name": …, "arguments": {…}}, in a text that comes in pieces."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Literal

from pdray.serve.parsers.events import CallArguments, CallEnd, CallStart, Event
from pdray.serve.parsers.json_value import SPACE, JsonValue

ARGUMENT_KEYS = ("arguments", "parameters")

State = Literal["open", "first key", "key", "colon", "value", "after"]


class CallObject:
    """One call. It begins (CallStart) once a known tool's name and the first character of its arguments are read;
    what breaks before that was no call.

    Attributes:
        done: the object is complete. broken: it is no call, or no JSON.
        begun: CallStart was given out.
        has_arguments: so were all of its arguments.
        held: the text so far, while it has not begun.
    """

    def __init__(self, names: Collection[str]) -> None:
        self.done = self.broken = self.begun = self.has_arguments = False
        self.held = ""
        self._names = names
        self._state: State = "open"
        self._value = JsonValue()
        self._key = ""
        self._text = ""  # of the key or value that is read
        self._name: str | None = None
        self._arguments: str | None = None

    def feed(self, text: str, start: int, events: list[Event]) -> int:
        """Read on from text[start], append what is found to `events`, and return where it stopped: at the text's end,
        behind the object, or before the character that is wrong.
        """
        at = start
        while at < len(text) and not (self.done or self.broken):
            before = at
            is_value = self._state == "value" or (
                self._state in ("first key", "key") and (self._text or text[at] == '"')
            )
            at = self._read(text, at, events) if is_value else self._structure(text, at, events)
            if not self.begun:
                self.held += text[before:at]
        if self.begun:
            self.held = ""
        return at

    def _structure(self, text: str, at: int, events: list[Event]) -> int:
        char = text[at]
        match self._state, char:
            case _, _ if char in SPACE:
                pass
            case "open", "{":
                self._state = "first key"
            case "colon", ":":
                self._state, self._value, self._text = "value", JsonValue(), ""
            case "after", ",":
                self._state, self._value, self._text = "key", JsonValue(), ""
            case (("after" | "first key"), "}"):
                self._close(events)
            case _:
                self.broken = True
        return at if self.broken else at + 1

    def _read(self, text: str, at: int, events: list[Event]) -> int:
        """A key, or a value."""
        end = self._value.feed(text, at)
        piece, self._text = text[at:end], self._text + text[at:end]
        self.broken = self._value.broken
        if self._state == "value" and self._key in ARGUMENT_KEYS and (begin := self._text.lstrip(SPACE)):
            if begin[0] != "{":
                self.broken = True  # arguments are an object
            elif self.begun:
                events.append(CallArguments(piece))
            elif self._name is not None:
                self._begin(begin, events)
        if self._value.done and not self.broken:
            self._complete(events)
        return end

    def _complete(self, events: list[Event]) -> None:
        """A key, or a value, has been read."""
        if self._state != "value":
            self._key, self._state = json.loads(self._text), "colon"
            if self._key in ARGUMENT_KEYS and self._arguments is not None:
                self.broken = True
            return
        self._state = "after"
        if self._key in ARGUMENT_KEYS:
            self._arguments = self._text
            self.has_arguments = self.begun
        elif self._key == "name":
            text = self._text.lstrip(SPACE)
            name = json.loads(text) if text.startswith('"') else None
            self.broken = self._name is not None or name not in self._names
            self._name = None if self.broken else name
            if self._arguments is not None and not self.broken:
                self._begin(self._arguments.lstrip(SPACE), events)
                self.has_arguments = True

    def _begin(self, arguments: str, events: list[Event]) -> None:
        assert self._name is not None
        self.begun = True
        events += [CallStart(self._name), CallArguments(arguments)]

    def _close(self, events: list[Event]) -> None:
        if self._name is None:
            self.broken = True
            return
        if not self.begun:
            self._begin("{}", events)  # a tool without parameters
            self.has_arguments = True
        self.done = True
        events.append(CallEnd())
