"""Errors of a chat request that was made from another API's: they name the fields that the client sent."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from pydantic import ValidationError

from pdray.errors import PdrayError
from pdray.serve.errors import to_api_error

PLACE = re.compile(r"messages\[\d+\](?:\.tool_calls\[\d+\](?:\.function|\.id)?|\.content|\.tool_call_id)?")
LIST = re.compile(r"^messages (?=has |must )")


@dataclass(slots=True)
class OwnNames:
    """Attributes:
    names: the client's, of the chat request's fields.
    words: what else is replaced in texts.
    places: the client's, of "messages[0]" and, where they do not simply follow from that, of what is within.
    """

    names: Mapping[str, str]
    words: Mapping[str, str] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)

    def note(self, index: int, place: str, **within: str) -> None:
        """Message number `index` was made from this place, and what is within it from those."""
        self.places.setdefault(f"messages[{index}]", place)
        self.places |= {f"messages[{index}].{name}": each for name, each in within.items()}

    def note_call(self, index: int, number: int, place: str, call_id: str) -> None:
        """A message's tool call was made from this place, whose id is there."""
        name = f"messages[{index}].tool_calls[{number}]"
        self.places |= {name: place, f"{name}.function": place, f"{name}.id": f"{place}.{call_id}"}

    def text(self, text: str) -> str:
        """An error's text in the client's words."""

        def own(found: re.Match[str]) -> str:
            path = found[0]
            if path in self.places:
                return self.places[path]
            head, _, rest = path.partition(".")
            return ".".join(filter(None, (self.places.get(head, head), rest)))

        text = LIST.sub(f"{self.names['messages']} ", PLACE.sub(own, text))
        for word, own_word in self.words.items():
            text = text.replace(word, own_word)
        return text

    @contextlib.contextmanager
    def told(self) -> Iterator[None]:
        """Errors within are raised as answers in the client's names."""
        try:
            yield
        except (PdrayError, ValidationError) as error:
            answer = to_api_error(error)
            param = answer.body["error"]["param"]
            answer.body["error"]["param"] = self.names.get(param or "", param)
            answer.body["error"]["message"] = self.text(answer.body["error"]["message"] or "")
            raise answer from error
