"""An assistant's tool calls in a conversation: what they must be."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import msgspec

from pdray.errors import InvalidRequestError

MAX_CALLS = 128  # in one message


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that the assistant has made.

    Attributes:
        id: by which the tool's message refers to it.
    """

    name: str
    arguments: dict[str, Any]
    id: str | None = None

    def as_dict(self, *, as_json: bool = False) -> dict[str, Any]:
        """OpenAI's form; the arguments are an object, which most templates take, or JSON as in the API."""
        arguments = self.arguments_json if as_json else self.arguments
        call: dict[str, Any] = {"type": "function", "function": {"name": self.name, "arguments": arguments}}
        return call if self.id is None else {"id": self.id, **call}

    @property
    def arguments_json(self) -> str:
        return json.dumps(self.arguments, ensure_ascii=False)


def parse_tool_calls(value: Any, place: str) -> tuple[ToolCall, ...]:
    """The calls of the message at `place`.

    Raises:
        InvalidRequestError: naming the field.
    """
    if not isinstance(value, list | tuple) or len(value) > MAX_CALLS:
        raise _refusal(f"{place}.tool_calls must be a list of at most {MAX_CALLS} calls")
    return tuple(_tool_call(each, f"{place}.tool_calls[{index}]") for index, each in enumerate(value))


def _tool_call(value: Any, place: str) -> ToolCall:
    if not isinstance(value, dict) or not isinstance(function := value.get("function"), dict):
        raise _refusal(f"{place} must be an object with id, type and function")
    if value.get("type", "function") != "function":
        raise _refusal(f"{place}.type must be 'function'; calls of other types are not supported")
    for where, fields, given in ((place, ("id", "type", "function", "index"), value), (place, KNOWN, function)):
        for name, each in given.items():
            if name not in fields and each is not None:
                raise _refusal(f"{where}: field {name!r} is not supported; leave it out")
    call_id = value.get("id")
    if not (call_id is None or isinstance(call_id, str)):
        raise _refusal(f"{place}.id must be a string")
    name = function.get("name")
    if not isinstance(name, str) or not name:
        raise _refusal(f"{place}.function.name must be a string that is not empty")
    return ToolCall(name, _arguments(function.get("arguments"), f"{place}.function.arguments"), call_id)


KNOWN = ("name", "arguments")


def _arguments(value: Any, place: str) -> dict[str, Any]:
    """An object, or as in OpenAI's API its JSON; none at all are an empty one."""
    if isinstance(value, str) and value.strip():
        try:
            value = msgspec.json.decode(value)  # by the rules of a body: no NaN, no lone surrogates
        except (ValueError, RecursionError) as error:
            raise _refusal(f"{place} is no valid JSON: {error}") from None
    if value is None or value == "":
        return {}
    if not isinstance(value, dict):
        raise _refusal(f"{place} must be the JSON of an object")
    return value


def _refusal(text: str) -> InvalidRequestError:
    return InvalidRequestError(text, "messages")
