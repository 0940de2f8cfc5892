"""One tool call or an array of them, as JSON, in a text that comes in pieces."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

from pdray.serve.parsers.call_object import CallObject
from pdray.serve.parsers.events import CallEnd, Event
from pdray.serve.parsers.json_value import SPACE

State = Literal["start", "call", "next", "after"]


class CallList:
    """Calls that belong together: {…} or [{…}, {…}].

    Attributes:
        done: the object or array is complete. broken: it is none of calls.
        held: the text that is part of no call, since the last call.
    """

    def __init__(self, names: Collection[str]) -> None:
        self.done = self.broken = False
        self.held = ""
        self._names = names
        self._state: State = "start"
        self._in_array = False
        self._call = CallObject(names)

    def feed(self, text: str, start: int, events: list[Event]) -> int:
        """As of CallObject."""
        at = start
        while at < len(text) and not (self.done or self.broken):
            if self._state == "call":
                at = self._call.feed(text, at, events)
                self.broken = self._call.broken
                if self._call.begun:
                    self.held = ""
                if self._call.done:
                    self._state, self.done = "after", not self._in_array
                elif self._call.broken:
                    self.held += self._call.held
                continue
            char = text[at]
            match self._state, char:
                case _, _ if char in SPACE:
                    pass
                case "start", "[":
                    self._in_array, self._state = True, "next"
                case (("start" | "next"), "{"):
                    self._state, self._call = "call", CallObject(self._names)
                    continue
                case "after", ",":
                    self._state = "next"
                case "after", "]":
                    self.done = True
                case _:
                    self.broken = True
                    break
            self.held += char
            at += 1
        return at

    def finish(self, events: list[Event]) -> None:
        """The text has ended. A call that has its arguments is complete; `held` is text otherwise."""
        if self._state != "call" or self._call.done:
            return
        if self._call.has_arguments:
            self._call.done = True
            events.append(CallEnd())
        else:
            self.held += self._call.held
