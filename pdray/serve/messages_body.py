"""Bodies of Anthropic's /v1/messages, and the chat requests that they stand for."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

import msgspec
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictStr, model_validator

from pdray.errors import InvalidRequestError
from pdray.router.conversation import is_empty, kind_of, shown
from pdray.sampling_params import MAX_INT32, SMALLEST_FLOAT32
from pdray.serve.fields import Ignored, Refused, known_fields
from pdray.serve.own_names import OwnNames
from pdray.serve.protocol import ChatBody, describe_ignored
from pdray.serve.values import Int32, Number, value_range

NAMES = {
    "messages": "messages",
    "max_completion_tokens": "max_tokens",
    "reasoning_effort": "output_config",
    "response_format": "output_config",
    "stop": "stop_sequences",
    "thinking_token_budget": "thinking",
    "parallel_tool_calls": "tool_choice",
}
# A hint for caches; prefixes are cached anyway. Thoughts are given in the clear, without a signature.
UNREAD = ("cache_control", "signature")

FIELDS: dict[str, Ignored | Refused] = {
    "cache_control": Ignored("a hint for caching or routing"),
    "container": Refused(),
    "context_management": Refused(),
    "inference_geo": Ignored("a hint for caching or routing"),
    "mcp_servers": Refused(),
    "metadata": Ignored("a label for the client's own use"),
    "service_tier": Refused(("auto", "standard_only")),
    "stop": Refused(instead="use stop_sequences"),
}


class Thinking(BaseModel):
    model_config = ConfigDict(extra="forbid")

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Annotated[Int32, Field(ge=1)] | None = None
    display: Literal["summarized", "omitted"] | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.type == "enabled") != (self.budget_tokens is not None):
            raise InvalidRequestError(
                f"thinking of type {self.type!r} {'needs' if self.type == 'enabled' else 'takes no'} budget_tokens",
                "thinking",
            )
        return self


class OutputConfig(BaseModel):
    model_config = ConfigDict(extra="forbid")

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: dict[str, Any] | None = None


class CountTokensBody(BaseModel):
    """POST /v1/messages/count_tokens.

    Attributes:
        messages: of users and assistants, of text, thinking, tool_use and tool_result. An assistant's at the end is
            continued.
        system: a text, or text blocks.
        thinking: enabled with a budget, disabled where the model's template can, or adaptive.
        tools: with an input_schema each.
        output_config: effort, and a format of type json_schema.
    """

    model_config = ConfigDict(extra="forbid", json_schema_extra=describe_ignored)

    model: StrictStr | None = None
    messages: list[dict[str, Any]]
    system: StrictStr | list[dict[str, Any]] | None = None
    thinking: Thinking | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: dict[str, Any] | None = None
    output_config: OutputConfig | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="before")
    @classmethod
    def _check_fields(cls, body: dict[str, Any]) -> dict[str, Any]:
        return known_fields(body, cls.model_fields, FIELDS)


class MessagesBody(CountTokensBody):
    """POST /v1/messages.

    Attributes:
        stop_sequences: texts that end the answer.
    """

    max_tokens: Annotated[Int32, Field(ge=1, le=MAX_INT32)]
    stop_sequences: list[StrictStr] | None = None
    stream: StrictBool | None = False
    temperature: Annotated[Number, value_range(0, 100)] | None = None
    top_k: Annotated[Int32, value_range(-1, MAX_INT32)] | None = None
    top_p: Annotated[Number, value_range(SMALLEST_FLOAT32, 1)] | None = None
    priority: Int32 | None = 0


def to_chat(body: CountTokensBody, names: OwnNames) -> ChatBody:
    """The chat request that it stands for.

    Args:
        names: are told what its messages are made of.

    Raises:
        InvalidRequestError, ValidationError: a block or tool is not supported.
    """
    choice = dict(body.tool_choice or {})
    is_single = choice.pop("disable_parallel_tool_use", None)
    output, messages = body.output_config or OutputConfig(), _messages(body, names)
    fields: dict[str, Any] = {
        "messages": messages,
        "tools": [_tool(each, f"tools[{index}]") for index, each in enumerate(body.tools or ())],
        "tool_choice": _choice(choice),
        "parallel_tool_calls": True if is_single is None else _not(is_single),
        "reasoning_effort": output.effort,
        "response_format": _format(output.format),
        "chat_template_kwargs": body.chat_template_kwargs,
    }
    if body.thinking is not None:
        fields["thinking_token_budget"] = body.thinking.budget_tokens
        if body.thinking.type == "disabled":
            if output.effort is not None:
                raise InvalidRequestError("output_config.effort and thinking disabled exclude each other", "thinking")
            fields["reasoning_effort"] = "none"
    if messages and messages[-1]["role"] == "assistant":
        fields |= {"continue_final_message": True, "add_generation_prompt": False}
    if isinstance(body, MessagesBody):
        fields |= {
            "max_completion_tokens": body.max_tokens,
            "stop": body.stop_sequences,
            "stream": body.stream,
            "temperature": body.temperature,
            "top_k": body.top_k,
            "top_p": body.top_p,
            "priority": body.priority,
        }
    return ChatBody.model_validate(fields)


def own_names() -> OwnNames:
    """For errors of the chat request; to_chat() notes where its messages come from."""
    return OwnNames(
        NAMES,
        {
            "response_format": "output_config.format",
            "reasoning_effort": "output_config.effort",
            "thinking_token_budget": "thinking.budget_tokens",
        },
    )


def _messages(body: CountTokensBody, names: OwnNames) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    if body.system:
        system = body.system if isinstance(body.system, str) else _texts(body.system, "system", "system")
        messages.append({"role": "system", "content": system})
        names.note(0, "system", content="system")
    for index, message in enumerate(body.messages):
        place = f"messages[{index}]"
        _only(message, ("role", "content"), place)
        role, content = message.get("role"), message.get("content")
        names.note(len(messages), place)
        if role not in ("user", "assistant"):
            raise _refusal(f"{place}.role is {shown(role)}; it must be 'user' or 'assistant'; use system for others")
        if isinstance(content, str):
            messages.append({"role": role, "content": content})
        elif not isinstance(content, list) or not content:
            kind = "an empty one" if content == [] else kind_of(content)
            raise _refusal(f"{place}.content must be a string or a list of blocks, not {kind}")
        elif role == "user":
            _add_user(content, messages, place, names)
        else:
            _add_assistant(content, messages, place, names)
    return messages


def _add_user(blocks: list[Any], messages: list[dict[str, Any]], place: str, names: OwnNames) -> None:
    """Results of tools become messages of their own, in the order given."""
    texts: list[dict[str, Any]] = []
    for index, block in enumerate(blocks):
        where = f"{place}.content[{index}]"
        if _type_of(block, where, ("text", "tool_result")) == "text":
            if not texts:
                names.note(len(messages), place)
                messages.append({"role": "user", "content": texts})
            texts.append(_text(block, where))
            continue
        _only(block, ("type", "tool_use_id", "content", "is_error"), where)
        result = block.get("content")
        given: list[Any] = (
            [] if result is None else [{"type": "text", "text": result}] if isinstance(result, str) else result
        )
        if not isinstance(given, list):
            raise _refusal(f"{where}.content must be a string or a list of blocks, not {kind_of(result)}")
        parts = _texts(given, f"{where}.content", "messages")
        if block.get("is_error"):
            parts.insert(0, {"type": "text", "text": "Error:"})
        names.note(len(messages), where, tool_call_id=f"{where}.tool_use_id")
        messages.append({"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": parts or ""})
        texts = []


def _add_assistant(blocks: list[Any], messages: list[dict[str, Any]], place: str, names: OwnNames) -> None:
    message: dict[str, Any] = {"role": "assistant", "content": None}
    messages.append(message)
    for index, block in enumerate(blocks):
        where = f"{place}.content[{index}]"
        match _type_of(block, where, ("text", "thinking", "tool_use")):
            case "text":
                message["content"] = [*(message["content"] or ()), _text(block, where)]
            case "thinking":
                _only(block, ("type", "thinking"), where)
                if not isinstance(thoughts := block.get("thinking"), str):
                    raise _refusal(f"{where}.thinking must be a string, not {kind_of(thoughts)}")
                message["reasoning"] = "\n".join(filter(None, (message.get("reasoning"), thoughts)))
            case _:
                _only(block, ("type", "id", "name", "input", "caller"), where)
                if not isinstance(given := block.get("input"), dict):
                    raise _refusal(f"{where}.input must be an object, not {kind_of(given)}")
                calls = message.setdefault("tool_calls", [])
                names.note_call(len(messages) - 1, len(calls), where, "id")
                function = {"name": block.get("name"), "arguments": msgspec.json.encode(given).decode()}
                calls.append({"id": block.get("id"), "type": "function", "function": function})


def _texts(blocks: list[Any], place: str, param: str) -> list[dict[str, Any]]:
    for index, block in enumerate(blocks):
        _type_of(block, f"{place}[{index}]", ("text",), param)
    return [_text(block, f"{place}[{index}]", param) for index, block in enumerate(blocks)]


def _text(block: dict[str, Any], place: str, param: str = "messages") -> dict[str, Any]:
    _only(block, ("type", "text", "citations"), place, param)
    if not isinstance(text := block.get("text"), str):
        raise InvalidRequestError(f"{place}.text must be a string, not {kind_of(text)}", param)
    return {"type": "text", "text": text}


def _type_of(block: Any, place: str, kinds: tuple[str, ...], param: str = "messages") -> str:
    if not isinstance(block, dict):
        raise InvalidRequestError(f"{place} must be an object, not {kind_of(block)}", param)
    if (kind := block.get("type")) not in kinds:
        raise InvalidRequestError(
            f"{place}: blocks of type {shown(kind)} are not supported here; only {', '.join(kinds)}", param
        )
    return str(kind)


def _tool(value: dict[str, Any], place: str) -> dict[str, Any]:
    if value.get("type") not in (None, "custom"):
        raise InvalidRequestError(
            f"{place}.type is {shown(value.get('type'))}; only tools with an input_schema of their own are supported",
            "tools",
        )
    _only(value, ("type", "name", "description", "input_schema", "strict", "eager_input_streaming"), place, "tools")
    if not isinstance(schema := value.get("input_schema"), dict):
        raise InvalidRequestError(
            f"{place}.input_schema must be a JSON Schema, an object, not {kind_of(schema)}", "tools"
        )
    function = {"name": value.get("name"), "description": value.get("description"), "parameters": schema}
    return {"type": "function", "function": function | {"strict": value.get("strict")}}


def _choice(value: dict[str, Any]) -> Any:
    match value:
        case {} if not value:
            return None
        case {"type": "auto" | "none" as kind} if len(value) == 1:
            return kind
        case {"type": "any"} if len(value) == 1:
            return "required"
        case {"type": "tool", "name": str(name)} if len(value) == 2:
            return {"type": "function", "function": {"name": name}}
    raise InvalidRequestError(
        f"tool_choice is {shown(value.get('type'))}; its type must be 'auto', 'any', 'none', or 'tool' with a name",
        "tool_choice",
    )


def _not(value: Any) -> bool:
    if not isinstance(value, bool):
        raise InvalidRequestError(
            f"tool_choice.disable_parallel_tool_use must be a boolean, not {kind_of(value)}", "tool_choice"
        )
    return not value


def _format(value: dict[str, Any] | None) -> dict[str, Any] | None:
    if value is None:
        return None
    if value.get("type") != "json_schema" or len(value) != 2 or "schema" not in value:
        raise InvalidRequestError("output_config.format must have type 'json_schema' and a schema", "output_config")
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": value["schema"]}}


def _only(value: dict[str, Any], known: tuple[str, ...], place: str, param: str = "messages") -> None:
    for name, each in value.items():
        if name not in known and name not in UNREAD and not is_empty(each):
            raise InvalidRequestError(f"{place}: field {name!r} is not supported; leave it out", param)


def _refusal(text: str) -> InvalidRequestError:
    return InvalidRequestError(text, "messages")
