"""One completion's text as thoughts, content and calls, and why it ended."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pdray.serve.parsers.events import CallArguments, CallEnd, CallStart, Event, Parser, Text, joined


@dataclass(frozen=True, slots=True)
class AnswerFormat:
    """How the answers to one request are written.

    Attributes:
        reasoning, tools: make the parser of one completion; None where there is nothing to find.
        single_call: only the first call is given out.
        named: the request forces a call of one tool. OpenAI's finish_reason is "stop" then.
    """

    reasoning: Callable[[], Parser] | None = None
    tools: Callable[[], Parser] | None = None
    single_call: bool = False
    named: bool = False

    def parser(self) -> AnswerParser:
        return AnswerParser(self)


class AnswerParser:
    """See the module. A Parser.

    Attributes:
        num_calls: that have begun. num_complete: of these.
    """

    def __init__(self, how: AnswerFormat) -> None:
        self._named, self._single_call = how.named, how.single_call
        self._reasoning = None if how.reasoning is None else how.reasoning()
        self._tools = None if how.tools is None else how.tools()
        self.num_calls = self.num_complete = 0
        self._skipping = False

    def feed(self, text: str) -> list[Event]:
        return self._count(self._in_answer([Text(text)] if self._reasoning is None else self._reasoning.feed(text)))

    def finish(self) -> list[Event]:
        events = self._in_answer([] if self._reasoning is None else self._reasoning.finish())
        return self._count(events + ([] if self._tools is None else self._tools.finish()))

    def _in_answer(self, events: list[Event]) -> list[Event]:
        if self._tools is None:
            return events
        found: list[Event] = []
        for event in events:
            found += self._tools.feed(event.text) if isinstance(event, Text) else [event]
        return found

    def _count(self, events: list[Event]) -> list[Event]:
        kept: list[Event] = []
        for event in events:
            match event:
                case CallStart():
                    self._skipping = self._single_call and self.num_calls > 0
                    self.num_calls += not self._skipping
                case CallEnd():
                    self.num_complete += not self._skipping
            if not (self._skipping and isinstance(event, CallStart | CallArguments | CallEnd)):
                kept.append(event)
        return joined(kept)

    def finish_reason(self, reason: str | None) -> str | None:
        """What a client is told: "tool_calls" in place of "stop" where every call is complete, and there is one."""
        is_called = self.num_calls > 0 and self.num_complete == self.num_calls and not self._named
        return "tool_calls" if reason == "stop" and is_called else reason
