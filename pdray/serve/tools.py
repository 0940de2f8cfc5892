"""The tools of a request, and which of them the model may or must call."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, StrictBool

from pdray.errors import InvalidRequestError
from pdray.router.conversation import is_empty, kind_of, shown

MAX_TOOLS = 128
FUNCTION_FIELDS = ("name", "description", "parameters", "strict")
NAME = re.compile(r"[A-Za-z0-9_.:\-]{1,128}")

Mode = Literal["none", "auto", "required"]


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call.

    Attributes:
        parameters: JSON Schema of its arguments; None takes none.
        strict: arguments must match the schema.
    """

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool = False

    def as_dict(self) -> dict[str, Any]:
        """For a chat template, in OpenAI's form."""
        function: dict[str, Any] = {"name": self.name}
        if self.description is not None:
            function["description"] = self.description
        function["parameters"] = self.schema
        return {"type": "function", "function": function}

    @property
    def schema(self) -> dict[str, Any]:
        """JSON Schema of the arguments."""
        return {"type": "object", "properties": {}} if self.parameters is None else self.parameters


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """What a request says of calls.

    Attributes:
        names: of the tools that may be called; None are all.
        named: exactly this one tool is called.
    """

    mode: Mode = "auto"
    names: frozenset[str] | None = None
    named: str | None = None


def parse_tools(value: Any) -> list[Tool]:
    """A body's field `tools`.

    Raises:
        InvalidRequestError: naming the tool and its field.
    """
    if is_empty(value):
        return []
    if not isinstance(value, list) or len(value) > MAX_TOOLS:
        raise _refusal(f"tools must be a list of at most {MAX_TOOLS} tools")
    tools = [_tool(each, f"tools[{index}]") for index, each in enumerate(value)]
    names = [tool.name for tool in tools]
    for name in names:
        if names.count(name) > 1:
            raise _refusal(f"tools has several functions of the name {name!r}")
    return tools


def _tool(value: Any, place: str) -> Tool:
    if not isinstance(value, dict):
        raise _refusal(f"{place} must be an object, not {kind_of(value)}")
    if value.get("type") != "function":
        raise _refusal(f"{place}.type is {shown(value.get('type'))}; only tools of type 'function' are supported")
    _no_others(value, ("type", "function"), place)
    return parse_function(value.get("function"), f"{place}.function")


def parse_function(value: Any, place: str) -> Tool:
    """The function at `place`.

    Raises:
        InvalidRequestError: naming the field.
    """
    if not isinstance(value, dict):
        raise _refusal(f"{place} must be an object with a name, not {kind_of(value)}")
    _no_others(value, FUNCTION_FIELDS, place)
    name, description = value.get("name"), value.get("description")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise _refusal(f"{place}.name is {shown(name)}; it must be 1 to 128 letters, digits or any of _ - . :")
    if not (description is None or isinstance(description, str)):
        raise _refusal(f"{place}.description must be a string, not {kind_of(description)}")
    parameters, strict = value.get("parameters"), value.get("strict")
    if not (parameters is None or isinstance(parameters, dict)):
        raise _refusal(f"{place}.parameters must be a JSON Schema, an object, not {kind_of(parameters)}")
    if parameters and parameters.get("type", "object") != "object":
        raise _refusal(f"{place}.parameters must be a schema of type 'object': arguments are one")
    if not (strict is None or isinstance(strict, bool)):
        raise _refusal(f"{place}.strict must be a boolean, not {kind_of(strict)}")
    return Tool(name, description, parameters or None, bool(strict))


def parse_tool_choice(value: Any) -> ToolChoice | None:
    """A body's field `tool_choice`; None if it says nothing.

    Raises:
        InvalidRequestError: it is not understood.
    """
    match value:
        case None:
            return None
        case "none" | "auto" | "required":
            return ToolChoice(value)
        case {"type": "function", "function": {"name": str(name)}} if len(value) == 2 and len(value["function"]) == 1:
            return ToolChoice("required", frozenset({name}), name)
        case {
            "type": "allowed_tools",
            "allowed_tools": {"mode": "auto" | "required" as mode, "tools": list(allowed)} as inner,
        } if len(value) == 2 and len(inner) == 2:
            names = [_allowed_name(each) for each in allowed]
            return ToolChoice(mode, frozenset(names))
    raise InvalidRequestError(
        f"tool_choice is {shown(value)}; it must be 'none', 'auto', 'required', "
        '{"type": "function", "function": {"name": …}} or {"type": "allowed_tools", …}',
        "tool_choice",
    )


def _allowed_name(value: Any) -> str:
    match value:
        case {"type": "function", "function": {"name": str(name)} as function} if len(value) == 2:
            if function.keys() <= {*FUNCTION_FIELDS}:  # the tool may be repeated
                return name
        case {"type": "function", "name": str(name)} if value.keys() <= {"type", *FUNCTION_FIELDS}:
            return name
    raise InvalidRequestError("tool_choice.allowed_tools.tools must be functions with a name each", "tool_choice")


def choose(tools: Sequence[Tool], choice: ToolChoice | None) -> tuple[ToolChoice, list[Tool]]:
    """The choice in force, and the tools that may be called: with "none", or without tools, none.

    Raises:
        InvalidRequestError: the choice names no tool, or asks for one where there is none.
    """
    if choice is None:
        choice = ToolChoice("auto" if tools else "none")
    known = {tool.name for tool in tools}
    for name in sorted(choice.names or ()):
        if name not in known:
            raise InvalidRequestError(f"tool_choice names {name!r}, which is not in tools", "tool_choice")
    if choice.mode == "required" and not (tools and (choice.names is None or choice.names)):
        raise InvalidRequestError("tool_choice asks for a call, but there is no tool; set tools", "tool_choice")
    if choice.mode == "none":
        return choice, []
    return choice, [tool for tool in tools if choice.names is None or tool.name in choice.names]


def _no_others(value: dict[str, Any], known: tuple[str, ...], place: str) -> None:
    for name, each in value.items():
        if name not in known and not is_empty(each):
            raise _refusal(f"{place}: field {name!r} is not supported; leave it out")


def _refusal(text: str) -> InvalidRequestError:
    return InvalidRequestError(text, "tools")


class FunctionInput(BaseModel):
    """A function, for the API's schema; parse_function checks it."""

    model_config = ConfigDict(extra="forbid")

    name: Annotated[str, Field(pattern=f"^{NAME.pattern}$")]
    description: str | None = None
    parameters: (
        Annotated[dict[str, Any], Field(json_schema_extra={"properties": {"type": {"const": "object"}}})] | None
    ) = None
    strict: StrictBool | None = None


class ToolInput(BaseModel):
    """A tool, for the API's schema."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["function"]
    function: FunctionInput


class FunctionName(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: str


class NamedChoice(BaseModel):
    """One tool, for the API's schema."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["function"]
    function: FunctionName


class AllowedTools(BaseModel):
    model_config = ConfigDict(extra="forbid")

    mode: Literal["auto", "required"]
    tools: list[ToolInput]


class AllowedChoice(BaseModel):
    """Some of the tools, for the API's schema."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


ToolsInput = Annotated[list[ToolInput], Field(max_length=MAX_TOOLS)] | None
ChoiceInput = Literal["none", "auto", "required"] | NamedChoice | AllowedChoice | None
Tools = Annotated[list[Tool], PlainValidator(parse_tools, json_schema_input_type=ToolsInput)]
Choice = Annotated[ToolChoice | None, PlainValidator(parse_tool_choice, json_schema_input_type=ChoiceInput)]
