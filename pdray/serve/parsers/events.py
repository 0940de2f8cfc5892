"""Parts of an answer, in the order in which a parser finds them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, Protocol


class Text(NamedTuple):
    """A piece of the answer's content."""

    text: str


class Reasoning(NamedTuple):
    """A piece of the model's thoughts."""

    text: str


class CallStart(NamedTuple):
    """A tool call begins; pieces of its arguments follow."""

    name: str


class CallArguments(NamedTuple):
    """A piece of the current call's arguments, which joined are a JSON object."""

    text: str


class CallEnd(NamedTuple):
    """The current call is complete. One without it was cut, or is broken."""


Event = Text | Reasoning | CallStart | CallArguments | CallEnd


class Parser(Protocol):
    """Takes one completion's text apart. However the text is cut into pieces, the events joined are the same."""

    def feed(self, text: str) -> list[Event]:
        """The next piece of text."""
        ...

    def finish(self) -> list[Event]:
        """The text has ended; what was held back."""
        ...


def joined(events: Iterable[Event]) -> list[Event]:
    """The same events with neighbouring pieces of one kind made one, and empty pieces left out."""
    result: list[Event] = []
    for event in events:
        last = result[-1] if result else None
        if isinstance(event, Text | Reasoning | CallArguments):
            if not event.text:
                continue
            if isinstance(last, Text | Reasoning | CallArguments) and type(last) is type(event):
                result[-1] = type(event)(last.text + event.text)
                continue
        result.append(event)
    return result
