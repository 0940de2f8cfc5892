"""Parts of an answer as the items of a response, and as the events that tell of them."""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from typing import Any

from pdray.serve.chat_answer import new_call_id
from pdray.serve.parsers.events import CallArguments, CallEnd, CallStart, Event, Reasoning, Text


class ResponseOutput:
    """The items of one response as they grow. Its methods return the events, without their numbers.

    Attributes:
        items: all so far; the last one may be open.
    """

    def __init__(self) -> None:
        self.items: list[dict[str, Any]] = []
        self._is_open = False
        self._text: list[str] = []  # of the open item
        self._is_complete = True

    def take(self, events: Iterable[Event]) -> list[dict[str, Any]]:
        """The next parts."""
        told: list[dict[str, Any]] = []
        for event in events:
            match event:
                case Text(text):
                    told += self._text_piece("message", "output_text", text)
                case Reasoning(text):
                    told += self._text_piece("reasoning", "reasoning_text", text)
                case CallStart(name):
                    told += self.close()
                    item = {"type": "function_call", "call_id": new_call_id(), "name": name, "arguments": ""}
                    told += self._open("fc", item)
                    self._is_complete = False
                case CallArguments(text):
                    self._text.append(text)
                    told.append(self._about("response.function_call_arguments.delta", delta=text))
                case CallEnd():
                    self._is_complete = True
                    told += self.close()
        return told

    def close(self, *, is_cut: bool = False) -> list[dict[str, Any]]:
        """The open item, if there is one, is at its end.

        Args:
            is_cut: the response ends here before its own end.
        """
        if not self._is_open:
            return []
        item, text = self.items[-1], "".join(self._text)
        told: list[dict[str, Any]] = []
        match item["type"]:
            case "function_call":
                item["arguments"] = text
                told.append(self._about("response.function_call_arguments.done", arguments=text, name=item["name"]))
            case "message":
                part = _part("output_text", text)
                item["content"] = [part]
                told.append(self._about("response.output_text.done", content_index=0, text=text, logprobs=[]))
                told.append(self._about("response.content_part.done", content_index=0, part=part))
            case "reasoning":
                part = _part("reasoning_text", text)
                item["content"] = [part]
                told.append(self._about("response.reasoning_text.done", content_index=0, text=text))
                told.append(self._about("response.content_part.done", content_index=0, part=part))
        item["status"] = "completed" if self._is_complete and not is_cut else "incomplete"
        self._is_open = False
        return [*told, {"type": "response.output_item.done", "output_index": len(self.items) - 1, "item": dict(item)}]

    def _text_piece(self, kind: str, part: str, text: str) -> list[dict[str, Any]]:
        told: list[dict[str, Any]] = []
        if not self._is_open or self.items[-1]["type"] != kind:
            told += self.close()
            if kind == "message":
                told += self._open("msg", {"type": kind, "role": "assistant", "content": []})
            else:
                told += self._open("rs", {"type": kind, "summary": [], "content": []})
            told.append(self._about("response.content_part.added", content_index=0, part=_part(part, "")))
        self._text.append(text)
        more: dict[str, Any] = {"logprobs": []} if kind == "message" else {}
        told.append(self._about(f"response.{part}.delta", content_index=0, delta=text, **more))
        return told

    def _open(self, prefix: str, item: dict[str, Any]) -> list[dict[str, Any]]:
        item = {"id": f"{prefix}_{uuid.uuid4().hex}", "status": "in_progress", **item}
        self.items.append(item)
        self._is_open, self._is_complete, self._text = True, True, []
        return [{"type": "response.output_item.added", "output_index": len(self.items) - 1, "item": dict(item)}]

    def _about(self, kind: str, **fields: Any) -> dict[str, Any]:
        return {"type": kind, "item_id": self.items[-1]["id"], "output_index": len(self.items) - 1, **fields}


def _part(kind: str, text: str) -> dict[str, Any]:
    return {"type": kind, "text": text, **({"annotations": [], "logprobs": []} if kind == "output_text" else {})}
