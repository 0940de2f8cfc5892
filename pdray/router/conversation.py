"""What the messages of a conversation must be. HTTP and LLM.chat both pass through here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pdray.errors import InvalidRequestError
from pdray.router.tool_calls import ToolCall, parse_tool_calls

MAX_MESSAGES = 2048
MAX_ROLE_CHARS = 64
MAX_NAME_CHARS = 64

REASONING_FIELDS = ("reasoning_content", "reasoning")  # two names of one thing
MESSAGE_FIELDS = ("role", "content", "name", "refusal", "tool_calls", "tool_call_id", *REASONING_FIELDS)
# Fields of a part beside its type and text. A cache hint changes no answer, and prefixes are cached anyway.
IGNORED_IN_PARTS = ("cache_control",)


@dataclass(frozen=True, slots=True)
class Message:
    """One message.

    Attributes:
        texts: its content's text parts; a string is one. None are empty lists.
        in_parts: it was given as a list of parts.
        name: of the participant; a template may have no place for it.
        tool_calls: an assistant's.
        tool_call_id: of the call that a tool's message answers; a template may have no place for it.
        reasoning: an assistant's thoughts. Templates leave those of former turns out.
    """

    role: str
    texts: tuple[str, ...]
    in_parts: bool = False
    name: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    reasoning: str | None = None

    @property
    def text(self) -> str:
        """The content as one string, parts on lines of their own."""
        return "\n".join(self.texts)


def parse_messages(value: Any) -> list[Message]:
    """Check a conversation in OpenAI's form.

    Raises:
        InvalidRequestError: naming the message, its field and the value. What is not understood is refused,
            unless it is null, false or empty.
    """
    if not isinstance(value, list | tuple):
        raise _refusal(f"messages must be a list of messages, not {kind_of(value)}")
    if not 1 <= len(value) <= MAX_MESSAGES:
        raise _refusal(f"messages has {len(value)} messages; it must have 1 to {MAX_MESSAGES}")
    return [_message(each, f"messages[{index}]") for index, each in enumerate(value)]


def is_empty(value: Any) -> bool:
    """Whether a field's value says nothing: null, false, or an empty string, list or object. 0 says something."""
    return value is None or value is False or (isinstance(value, str | list | tuple | dict) and not value)


def shown(value: Any) -> str:
    """A value for an error's text; what is no string may be nested too deep for repr()."""
    if isinstance(value, bool):
        return str(value).lower()
    is_short = isinstance(value, str | float) or (isinstance(value, int) and value.bit_length() <= 64)
    return repr(value) if is_short else kind_of(value)


def _message(value: Any, place: str) -> Message:
    if not isinstance(value, dict):
        raise _refusal(f"{place} must be an object with role and content, not {kind_of(value)}")
    role = value.get("role")
    if not isinstance(role, str) or not 1 <= len(role) <= MAX_ROLE_CHARS:
        raise _refusal(f"{place}.role is {shown(role)}; it must be a string of 1 to {MAX_ROLE_CHARS} characters")
    if role == "function" or not is_empty(value.get("function_call")):
        raise _refusal(f"{place} (role {role!r}): functions are not supported; use tools: tool_calls, and role 'tool'")
    for name, given in value.items():
        if not (name in MESSAGE_FIELDS or is_empty(given)):
            raise _refusal(f"{place} (role {role!r}): field {name!r} is not supported; leave it out")
    calls: tuple[ToolCall, ...] = ()
    if not is_empty(value.get("tool_calls")):
        _only_of("assistant", role, f"{place}.tool_calls")
        calls = parse_tool_calls(value["tool_calls"], place)
    call_id = _text_of("tool", "tool_call_id", value, role, place)
    reasoning = [_text_of("assistant", name, value, role, place) for name in REASONING_FIELDS]
    texts, in_parts = _texts(value.get("content"), role, f"{place}.content")
    refusal = value.get("refusal")
    if not is_empty(refusal):
        texts = [*(text for text in texts if text), _refusal_text(refusal, role, f"{place}.refusal")]
    elif value.get("content") is None and role != "assistant":
        raise _refusal(f"{place} (role {role!r}) has no content")
    name = value.get("name")
    if not (name is None or isinstance(name, str)) or len(name or "") > MAX_NAME_CHARS:
        raise _refusal(f"{place}.name is {shown(name)}; it must be a string of at most {MAX_NAME_CHARS} characters")
    return Message(role, tuple(texts), in_parts, name, calls, call_id, reasoning[0] or reasoning[1])


def _text_of(only_role: str, field: str, value: dict[str, Any], role: str, place: str) -> str | None:
    """A message's field that is a text, and that messages of one role alone may have."""
    text = value.get(field)
    if is_empty(text):
        return None
    _only_of(only_role, role, f"{place}.{field}")
    if not isinstance(text, str):
        raise _refusal(f"{place}.{field} must be a string, not {kind_of(text)}")
    return text


def _only_of(only_role: str, role: str, place: str) -> None:
    if role != only_role:
        raise _refusal(f"{place}: only a message of role {only_role!r} may have it, not one of {role!r}")


def _texts(content: Any, role: str, place: str) -> tuple[list[str], bool]:
    """The texts of a content, and whether it is a list of parts."""
    if content is None:
        return [""], False
    if isinstance(content, str):
        return [content], False
    if not isinstance(content, list | tuple):
        raise _refusal(f"{place} must be a string or a list of parts, not {kind_of(content)}")
    return [_part(part, role, f"{place}[{index}]") for index, part in enumerate(content)] or [""], True


def _part(part: Any, role: str, place: str) -> str:
    if not isinstance(part, dict):
        raise _refusal(f"{place} must be an object with type and text, not {kind_of(part)}")
    kind = part.get("type")
    if kind not in ("text", "refusal"):
        raise _refusal(f"{place}: content parts of type {shown(kind)} are not supported; only 'text'")
    for name, given in part.items():
        if name not in ("type", kind, *IGNORED_IN_PARTS) and not is_empty(given):
            raise _refusal(f"{place}: field {name!r} of a content part is not supported; leave it out")
    text = part.get(kind)
    if kind == "refusal":
        return _refusal_text(text, role, place)
    if not isinstance(text, str):
        raise _refusal(f"{place}: a content part of type 'text' needs a string in its field text, not {kind_of(text)}")
    return text


def _refusal_text(value: Any, role: str, place: str) -> str:
    """An assistant's refusal is what it said."""
    if role != "assistant":
        raise _refusal(f"{place}: only a message of role 'assistant' may hold a refusal, not one of {role!r}")
    if not isinstance(value, str):
        raise _refusal(f"{place}: a refusal must be a string, not {kind_of(value)}")
    return value


def _refusal(text: str) -> InvalidRequestError:
    return InvalidRequestError(text, "messages")


def kind_of(value: Any) -> str:
    """A value's type with its article, as JSON calls it where JSON has it."""
    match value:
        case None:
            return "null"
        case bool():
            return "a boolean"
        case int() | float():
            return "a number"
        case str():
            return "a string"
        case list() | tuple():
            return "an array"
        case dict():
            return "an object"
    return f"a {type(value).__name__}"
