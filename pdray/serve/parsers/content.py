"""Text around calls: spaces beside a call are markup, and no content."""

from __future__ import annotations

from pdray.serve.parsers.events import Event, Text


class Content:
    """Gives text out, but holds back spaces at its end until it is clear what they stand beside."""

    def __init__(self) -> None:
        self._spaces = ""
        self._after_call = False

    def text(self, text: str, events: list[Event]) -> None:
        """The next piece of text."""
        if self._after_call:
            text = text.lstrip()
            if not text:
                return
            self._after_call = False
        text = self._spaces + text
        shown = text.rstrip()
        self._spaces = text[len(shown) :]
        events.append(Text(shown))

    def call(self) -> None:
        """A call stands here."""
        self._spaces, self._after_call = "", True

    def finish(self, events: list[Event]) -> None:
        """The text has ended."""
        events.append(Text(self._spaces))
        self._spaces = ""


def overlap(text: str, mark: str) -> int:
    """Characters at the text's end that the mark may begin with."""
    return next((n for n in range(min(len(text), len(mark) - 1), 0, -1) if text.endswith(mark[:n])), 0)
