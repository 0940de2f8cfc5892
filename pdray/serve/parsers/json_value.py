"""Where a JSON value ends, in a text that comes in pieces."""

from __future__ import annotations

import re
from typing import Literal

MAX_DEPTH = 200  # Python's json refuses what is nested much deeper
SPACE = " \t\n\r"
SCALAR = re.compile(r"true|false|null|-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?", re.ASCII)
SCALAR_CHARS = re.compile(r"[-+.\w]*", re.ASCII)
PLAIN = re.compile(r'[^"\\\x00-\x1f]*')  # of a string
CLOSING = {"{": "}", "[": "]"}

State = Literal["value", "first value", "key", "first key", "colon", "after", "string", "escape", "hex", "scalar"]


class JsonValue:
    """Follows one value, strictly by RFC 8259.

    Attributes:
        done: the value is complete. broken: the text is no JSON.
    """

    def __init__(self) -> None:
        self.done = self.broken = False
        self._state: State = "value"
        self._open: list[str] = []
        self._in_key = False
        self._hex_left = 0
        self._scalar = ""

    def feed(self, text: str, start: int = 0) -> int:
        """Read on from text[start]. Returns where it stopped: at the text's end, behind the value, or before the
        character that is wrong. A number's end is seen by what follows it.
        """
        at = start
        while at < len(text) and not (self.done or self.broken):
            match self._state:
                case "string":
                    at = self._string(text, at)
                case "scalar":
                    at = self._read_scalar(text, at)
                case "escape":
                    self._hex_left = 4
                    self._state = "hex" if text[at] == "u" else "string"
                    self.broken = text[at] not in '"\\/bfnrtu'
                    at += not self.broken
                case "hex":
                    self.broken = text[at] not in "0123456789abcdefABCDEF"
                    at += not self.broken
                    self._hex_left -= 1
                    self._state = "string" if self._hex_left == 0 else "hex"
                case _ if text[at] in SPACE:
                    at += 1
                case _:
                    at = self._structure(text, at)
        return at

    def _string(self, text: str, at: int) -> int:
        found = PLAIN.match(text, at)
        assert found is not None
        at = found.end()
        if at == len(text):
            return at
        match text[at]:
            case '"' if self._in_key:
                self._in_key, self._state = False, "colon"
            case '"':
                self._complete()
            case "\\":
                self._state = "escape"
            case _:
                self.broken = True
                return at
        return at + 1

    def _read_scalar(self, text: str, at: int) -> int:
        found = SCALAR_CHARS.match(text, at)
        assert found is not None
        self._scalar += found.group()
        if found.end() < len(text):
            if SCALAR.fullmatch(self._scalar):
                self._complete()
            else:
                self.broken = True
        return found.end()

    def _structure(self, text: str, at: int) -> int:
        char = text[at]
        match self._state, char:
            case ("value" | "first value", '"'):
                self._state = "string"
            case ("value" | "first value", "{" | "["):
                self._open.append(char)
                self._state = "first key" if char == "{" else "first value"
                self.broken = len(self._open) > MAX_DEPTH
            case ("first value", "]") | ("first key", "}"):
                self._open.pop()
                self._complete()
            case ("value" | "first value", _) if char.isascii() and (char.isalnum() or char == "-"):
                self._state, self._scalar = "scalar", ""
                return at
            case ("key" | "first key", '"'):
                self._state, self._in_key = "string", True
            case ("colon", ":"):
                self._state = "value"
            case ("after", ","):
                self._state = "key" if self._open[-1] == "{" else "value"
            case ("after", _) if char == CLOSING[self._open[-1]]:
                self._open.pop()
                self._complete()
            case _:
                self.broken = True
        return at if self.broken else at + 1

    def _complete(self) -> None:
        self._state = "after"
        self.done = not self._open
