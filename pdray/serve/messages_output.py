"""Parts of an answer as the content blocks of an Anthropic message, and as the events that tell of them."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable
from typing import Any

from pdray.serve.parsers.events import CallArguments, CallEnd, CallStart, Event, Reasoning, Text

# Of a block's type: its field, and the type and the field of its deltas.
DELTAS = {
    "text": ("text", "text_delta", "text"),
    "thinking": ("thinking", "thinking_delta", "thinking"),
    "tool_use": ("input", "input_json_delta", "partial_json"),
}


class MessageOutput:
    """The blocks of one message as they grow. Its methods return the events."""

    def __init__(self) -> None:
        self._blocks: list[dict[str, Any]] = []
        self._pieces: list[str] = []  # of the open block
        self._is_open = self._is_cut = False

    def take(self, events: Iterable[Event]) -> list[dict[str, Any]]:
        """The next parts."""
        told: list[dict[str, Any]] = []
        for event in events:
            match event:
                case Text(text):
                    told += self._piece(text, {"type": "text", "text": ""})
                case Reasoning(text):
                    told += self._piece(text, {"type": "thinking", "thinking": "", "signature": ""})
                case CallStart(name):
                    told += self.close()
                    call = {"type": "tool_use", "id": f"toolu_{uuid.uuid4().hex[:24]}", "name": name, "input": {}}
                    told += self._open(call)
                    self._is_cut = True
                case CallArguments(text):
                    told.append(self._delta(text))
                case CallEnd():
                    self._is_cut = False
                    told += self.close()
        return told

    def close(self) -> list[dict[str, Any]]:
        """The open block, if there is one, is at its end."""
        if not self._is_open:
            return []
        block, text = self._blocks[-1], "".join(self._pieces)
        if block["type"] != "tool_use":
            block[DELTAS[block["type"]][0]] = text
        elif not self._is_cut:
            block["input"] = json.loads(text)
        self._is_open = False
        return [{"type": "content_block_stop", "index": len(self._blocks) - 1}]

    @property
    def content(self) -> list[dict[str, Any]]:
        """All blocks, but for a call that was cut, whose input is no JSON. After close()."""
        return self._blocks[: len(self._blocks) - self._is_cut]

    def _piece(self, text: str, empty: dict[str, Any]) -> list[dict[str, Any]]:
        told: list[dict[str, Any]] = []
        if not self._is_open or self._blocks[-1]["type"] != empty["type"]:
            told = self.close() + self._open(empty)
        return [*told, self._delta(text)]

    def _open(self, block: dict[str, Any]) -> list[dict[str, Any]]:
        self._blocks.append(block)
        self._is_open, self._is_cut, self._pieces = True, False, []
        return [{"type": "content_block_start", "index": len(self._blocks) - 1, "content_block": dict(block)}]

    def _delta(self, text: str) -> dict[str, Any]:
        self._pieces.append(text)
        _, kind, field = DELTAS[self._blocks[-1]["type"]]
        return {"type": "content_block_delta", "index": len(self._blocks) - 1, "delta": {"type": kind, field: text}}
