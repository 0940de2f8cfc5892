"""[get_weather(city="Paris"), now()] as the whole answer: Llama 3.2's small models and others."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Collection
from typing import Any, Literal

from pdray.serve.parsers.content import Content
from pdray.serve.parsers.events import CallArguments, CallEnd, CallStart, Event, joined

NAME = re.compile(r"[\w.\-]*", re.ASCII)
MAX_CALL_CHARS = 64 * 1024
MAX_DEPTH = 50  # of brackets; ast's own recursion is bounded at about twice as much
CLOSING = {"(": ")", "[": "]", "{": "}"}

State = Literal["start", "next", "call", "after", "text"]


class PythonicParser:
    """Each call is given out when its last bracket closes: only then is it clear that it is one. An answer that begins
    otherwise is all text, and what follows the list is.
    """

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self._content = Content()
        self._state: State = "start"
        self._held = ""
        self._call = ""
        self._brackets = ""  # that are open in the call
        self._quote = ""
        self._is_escaped = False

    def feed(self, text: str) -> list[Event]:
        events: list[Event] = []
        for at, char in enumerate(text):
            if self._state == "text":
                self._content.text(text[at:], events)
                break
            self._step(char, events)
        return joined(events)

    def _step(self, char: str, events: list[Event]) -> None:
        match self._state, char:
            case "call", _:
                self._in_call(char, events)
                return
            case _, _ if char.isspace():
                pass
            case "start", "[":
                self._state = "next"
            case "next", _ if char.isalpha() or char == "_":
                self._state, self._call, self._brackets = "call", "", ""
                self._in_call(char, events)
                return
            case "after", ",":
                self._state = "next"
            case "after", "]":
                self._held, self._state = "", "text"
                return
            case _:
                self._give_up(char, events)
                return
        self._held += char

    def _in_call(self, char: str, events: list[Event]) -> None:
        self._call += char
        if not self._brackets:
            if char == "(" and self._call[:-1] in self._names:
                self._brackets = char
            elif not NAME.fullmatch(self._call):
                self._give_up("", events)
        elif self._is_escaped:
            self._is_escaped = False
        elif self._quote:
            self._is_escaped = char == "\\"
            self._quote = "" if char == self._quote else self._quote
        elif char in "'\"":
            self._quote = char
        elif char in CLOSING:
            self._brackets += char
        elif char in ")]}":
            if CLOSING[self._brackets[-1]] != char:
                self._give_up("", events)
                return
            self._brackets = self._brackets[:-1]
            if not self._brackets:
                self._end_call(events)
        if len(self._call) > MAX_CALL_CHARS or len(self._brackets) > MAX_DEPTH:
            self._give_up("", events)

    def _end_call(self, events: list[Event]) -> None:
        name, _, inner = self._call.partition("(")
        arguments = _arguments(inner[:-1])
        if arguments is None:
            self._give_up("", events)
            return
        self._content.call()
        events += [CallStart(name), CallArguments(arguments), CallEnd()]
        self._held = self._call = ""
        self._state = "after"

    def _give_up(self, char: str, events: list[Event]) -> None:
        self._state = "text"
        self._content.text(self._held + self._call + char, events)
        self._held = self._call = ""

    def finish(self) -> list[Event]:
        events: list[Event] = []
        if self._state != "text":
            self._give_up("", events)
        self._content.finish(events)
        return joined(events)


def _arguments(text: str) -> str | None:
    """Keyword arguments of literals as a JSON object; None of anything else."""
    try:
        call = ast.parse(f"f({text})", mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    if not isinstance(call, ast.Call) or call.args:
        return None
    values: dict[str, Any] = {}
    try:
        for keyword in call.keywords:
            if keyword.arg is None or keyword.arg in values:
                return None
            values[keyword.arg] = ast.literal_eval(keyword.value)
        arguments = json.dumps(values, ensure_ascii=False, allow_nan=False)
        arguments.encode()  # a lone surrogate is no text
        return arguments
    except (ValueError, TypeError, RecursionError):
        return None
