"""Bodies of /v1/responses, and the chat requests that they stand for."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictStr, model_validator

from pdray.errors import InvalidRequestError
from pdray.router.conversation import is_empty, kind_of, shown
from pdray.sampling_params import MAX_INT32, SMALLEST_FLOAT32
from pdray.serve.fields import Ignored, Refused, known_fields
from pdray.serve.own_names import OwnNames
from pdray.serve.protocol import ChatBody, ReasoningEffort, describe_ignored
from pdray.serve.values import Int32, Number, value_range

STATELESS = "nothing is stored here; send the whole conversation as input"
NAMES = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "max_completion_tokens": "max_output_tokens",
    "reasoning_effort": "reasoning",
    "response_format": "text",
}
TEXTS = ("input_text", "output_text", "text")

# What is not among its fields, where /v1/responses differs from pdray.serve.fields.
FIELDS: dict[str, Ignored | Refused] = {
    "background": Refused(instead="the answer is given at once, or streamed"),
    "context_management": Refused(),
    "conversation": Refused(instead=STATELESS),
    "max_tokens": Refused(instead="use max_output_tokens"),
    "max_tool_calls": Ignored("it counts calls of built-in tools, of which there are none"),
    "messages": Refused(instead="use input"),
    "previous_response_id": Refused(instead=STATELESS),
    "prompt": Refused(instead="use input"),
    "prompt_logprobs": Refused(instead="use /v1/chat/completions"),
    "response_format": Refused(instead="use text.format"),
    "store": Refused((False,), STATELESS),
    "stream_options": Refused(({}, {"include_obfuscation": False})),
    "thinking_token_budget": Refused((-1,), "use /v1/chat/completions"),
    "top_logprobs": Refused((0,), "use /v1/chat/completions"),
    "truncation": Refused(("disabled",), "shorten the input"),
}


class Reasoning(BaseModel):
    """Attributes:
    summary, generate_summary: thoughts are given as they are.
    """

    model_config = ConfigDict(extra="forbid")

    effort: ReasoningEffort | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None


class TextOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")

    format: dict[str, Any] | None = None
    verbosity: Literal["medium"] | None = None


class ResponsesBody(BaseModel):
    """POST /v1/responses.

    Attributes:
        input: a text, or items: messages, function_call, function_call_output, reasoning.
        instructions: a system message before it.
        tools: functions alone.
        include: only reasoning.encrypted_content, which is not there: thoughts are given in the clear.
    """

    model_config = ConfigDict(extra="forbid", json_schema_extra=describe_ignored)

    model: StrictStr | None = None
    input: StrictStr | list[dict[str, Any]]
    instructions: StrictStr | None = None
    stream: StrictBool | None = False
    max_output_tokens: Annotated[Int32, value_range(1, MAX_INT32)] | None = None
    temperature: Annotated[Number, value_range(0, 100)] | None = None
    top_p: Annotated[Number, value_range(SMALLEST_FLOAT32, 1)] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: StrictStr | dict[str, Any] | None = None
    parallel_tool_calls: StrictBool | None = True
    reasoning: Reasoning | None = None
    text: TextOptions | None = None
    include: list[Literal["reasoning.encrypted_content"]] | None = None
    metadata: Annotated[dict[str, StrictStr], Field(max_length=16)] | None = None
    user: StrictStr | None = None
    priority: Int32 | None = 0
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="before")
    @classmethod
    def _check_fields(cls, body: dict[str, Any]) -> dict[str, Any]:
        return known_fields(body, cls.model_fields, FIELDS)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.max_output_tokens is not None and self.max_output_tokens < 1:
            raise InvalidRequestError(
                f"max_output_tokens is {self.max_output_tokens}; it must be at least 1", "max_output_tokens"
            )
        return self


def to_chat(body: ResponsesBody, names: OwnNames) -> ChatBody:
    """The chat request that it stands for.

    Args:
        names: are told what its messages are made of.

    Raises:
        InvalidRequestError, ValidationError: an item or tool is not supported.
    """
    reasoning, text = body.reasoning or Reasoning(), body.text or TextOptions()
    fields = {
        "messages": _messages(body, names),
        "stream": body.stream,
        "max_completion_tokens": body.max_output_tokens,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "tools": [_tool(each, f"tools[{index}]") for index, each in enumerate(body.tools or ())],
        "tool_choice": _choice(body.tool_choice),
        "parallel_tool_calls": body.parallel_tool_calls,
        "reasoning_effort": reasoning.effort,
        "response_format": _format(text.format),
        "priority": body.priority,
        "chat_template_kwargs": body.chat_template_kwargs,
    }
    return ChatBody.model_validate(fields)


def own_names() -> OwnNames:
    """For errors of the chat request; to_chat() notes where its messages come from."""
    return OwnNames(NAMES, {"response_format": "text.format", "reasoning_effort": "reasoning.effort"})


def _messages(body: ResponsesBody, names: OwnNames) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    if body.instructions:
        messages.append({"role": "system", "content": body.instructions})
        names.note(0, "instructions", content="instructions")
    if isinstance(body.input, str):
        names.note(len(messages), "input", content="input")
        return [*messages, {"role": "user", "content": body.input}]
    for index, item in enumerate(body.input):
        _add(item, messages, f"input[{index}]", names)
    return messages


def _add(item: dict[str, Any], messages: list[dict[str, Any]], place: str, names: OwnNames) -> None:
    """An item as a message, or as a part of the assistant's that is there."""
    kind = item.get("type", "message")
    match kind:
        case "message":
            _only(item, ("type", "role", "content", "id", "status", "phase"), place)
            message = {"role": item.get("role"), "content": _content(item.get("content"), f"{place}.content")}
            if message["role"] == "assistant":
                last = _assistant(messages)
                if last.get("content") is None and not last.get("tool_calls"):
                    last["content"] = message["content"]
                    names.note(len(messages) - 1, place, content=f"{place}.content")
                    return
            names.note(len(messages), place)
            messages.append(message)
        case "function_call":
            _only(item, ("type", "call_id", "name", "arguments", "id", "status"), place)
            function = {"name": item.get("name"), "arguments": item.get("arguments")}
            call = {"id": item.get("call_id"), "type": "function", "function": function}
            calls = _assistant(messages).setdefault("tool_calls", [])
            names.note(len(messages) - 1, place)
            names.note_call(len(messages) - 1, len(calls), place, "call_id")
            calls.append(call)
        case "function_call_output":
            _only(item, ("type", "call_id", "output", "id", "status"), place)
            output = _content(item.get("output"), f"{place}.output")
            names.note(len(messages), place, content=f"{place}.output", tool_call_id=f"{place}.call_id")
            messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": output})
        case "reasoning":
            _only(item, ("type", "id", "summary", "content", "encrypted_content", "status"), place)
            parts = [part for name in ("content", "summary") for part in _list(item.get(name), f"{place}.{name}")]
            thoughts = _content(parts, place, REASONING_TEXTS)
            names.note(len(messages), place)
            messages.append({"role": "assistant", "content": None, "reasoning": "\n".join(t["text"] for t in thoughts)})
        case _:
            raise _refusal(f"{place}: items of type {shown(kind)} are not supported")


def _list(value: Any, place: str) -> list[Any]:
    if not isinstance(value, list | None):
        raise _refusal(f"{place} must be a list of parts, not {kind_of(value)}")
    return value or []


REASONING_TEXTS = ("reasoning_text", "summary_text")


def _assistant(messages: list[dict[str, Any]]) -> dict[str, Any]:
    """The assistant's message at the end."""
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": None})
    return messages[-1]


def _content(value: Any, place: str, kinds: tuple[str, ...] = TEXTS) -> Any:
    """A content as in a chat."""
    if not isinstance(value, list):
        return value
    parts = []
    for index, part in enumerate(value):
        if not isinstance(part, dict):
            raise _refusal(f"{place}[{index}] must be an object, not {kind_of(part)}")
        if part.get("type") == "refusal":
            parts.append({"type": "refusal", "refusal": part.get("refusal")})
            continue
        if part.get("type") not in kinds or not isinstance(part.get("text"), str):
            raise _refusal(f"{place}[{index}]: parts of type {shown(part.get('type'))} are not supported; only texts")
        _only(part, ("type", "text", "annotations", "logprobs"), f"{place}[{index}]")
        parts.append({"type": "text", "text": part["text"]})
    return parts


def _tool(value: dict[str, Any], place: str) -> dict[str, Any]:
    if value.get("type") != "function":
        raise InvalidRequestError(
            f"{place}.type is {shown(value.get('type'))}; only tools of type 'function' are supported", "tools"
        )
    return {"type": "function", "function": {name: each for name, each in value.items() if name != "type"}}


def _choice(value: Any) -> Any:
    match value:
        case {"type": "function", "name": name} if len(value) == 2:
            return {"type": "function", "function": {"name": name}}
        case {"type": "allowed_tools", "mode": mode, "tools": tools} if len(value) == 3:
            return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}
    return value


def _format(value: dict[str, Any] | None) -> dict[str, Any] | None:
    if value is None or value.get("type") != "json_schema":
        return value
    return {"type": "json_schema", "json_schema": {name: each for name, each in value.items() if name != "type"}}


def _only(value: dict[str, Any], known: tuple[str, ...], place: str) -> None:
    for name, each in value.items():
        if name not in known and not is_empty(each):
            raise _refusal(f"{place}: field {name!r} is not supported; leave it out")


def _refusal(text: str) -> InvalidRequestError:
    return InvalidRequestError(text, "input")
