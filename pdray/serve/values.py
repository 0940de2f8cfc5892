"""Types of the values in request bodies: what is taken for a number, a stop string, a prompt."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PlainValidator
from pydantic.fields import FieldInfo

from pdray.errors import InvalidRequestError
from pdray.router.conversation import shown
from pdray.sampling_params import MAX_BAD_WORD_CHARS, MAX_INT32, MAX_LOGIT_BIAS, MAX_STOP_STRINGS

FORMATS = ("text", "json_object", "json_schema")
MAX_STOP_CHARS = 1024  # every token searches as much text for it
MAX_ALL_STOP_CHARS = 16 * MAX_STOP_CHARS


def value_range(lowest: float, highest: float) -> FieldInfo:
    """A range for the API's schema; SamplingParams checks it."""
    return Field(json_schema_extra={"minimum": lowest, "maximum": highest})


def _whole(value: Any) -> Any:
    """4 for 4.0: to JSON they are one number, and JavaScript and Lua write either."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _stop(value: Any) -> str | list[str] | None:
    if not (value is None or isinstance(value, str) or (isinstance(value, list) and all_are(str, value))):
        raise InvalidRequestError("stop must be a string or a list of strings", "stop")
    lengths = [len(each) for each in ([value] if isinstance(value, str) else value or ())]
    if max(lengths, default=0) > MAX_STOP_CHARS:
        raise InvalidRequestError(
            f"a stop string has {max(lengths)} characters; it may have at most {MAX_STOP_CHARS}", "stop"
        )
    if sum(lengths) > MAX_ALL_STOP_CHARS:
        raise InvalidRequestError(
            f"the stop strings have {sum(lengths)} characters; together they may have at most {MAX_ALL_STOP_CHARS}",
            "stop",
        )
    return value


def _prompts(value: Any) -> list[str | list[int]]:
    """One or more prompts of whatever form as a list of prompts."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list):
        if not value:
            raise InvalidRequestError("prompt is an empty list; it must hold at least one prompt or token id", "prompt")
        if all_are(int, value):
            return [value]
        if all_are(str, value) or all(isinstance(each, list) and all_are(int, each) for each in value):
            return value
    raise InvalidRequestError(
        "prompt must be a string, a list of strings, a list of token ids or a list of such lists", "prompt"
    )


def all_are(kind: type, values: list[Any]) -> bool:
    """Exactly of this type: true is no token id."""
    return all(type(value) is kind for value in values)


def _format(value: Any) -> str:
    if value not in FORMATS:
        raise InvalidRequestError(
            f"response_format of type {shown(value)} is not supported; use {', '.join(map(repr, FORMATS))}",
            "response_format",
        )
    return str(value)


def _token_id(value: Any) -> int:
    """JSON's names are strings. Each id has one: with leading zeros, two would be the same."""
    if not (isinstance(value, str) and value.isascii() and value.isdecimal() and str(int(value[:10])) == value):
        raise InvalidRequestError(f"logit_bias has the name {shown(value)}; names must be token ids", "logit_bias")
    return int(value)


Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Integer = Annotated[int, Field(strict=True), BeforeValidator(_whole)]
Int32 = Annotated[int, Field(strict=True, ge=-(2**31), le=MAX_INT32), BeforeValidator(_whole)]
TokenId = Annotated[int, Field(strict=True, ge=0, le=MAX_INT32), BeforeValidator(_whole)]

BadWord = Annotated[str, Field(strict=True, max_length=MAX_BAD_WORD_CHARS, pattern=r"\S")]
TokenIdName = Annotated[int, BeforeValidator(_token_id)]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
StopInput = StopString | Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS)] | None
PromptInput = str | list[str] | list[int] | list[list[int]]
Stop = Annotated[str | list[str] | None, PlainValidator(_stop, json_schema_input_type=StopInput)]
Prompts = Annotated[list[str | list[int]], PlainValidator(_prompts, json_schema_input_type=PromptInput)]
Format = Annotated[str, PlainValidator(_format, json_schema_input_type=Literal["text", "json_object", "json_schema"])]
LogitBias = Annotated[
    dict[TokenIdName, Annotated[Number, value_range(-100, 100)]],
    Field(max_length=MAX_LOGIT_BIAS, json_schema_extra={"propertyNames": {"pattern": "^(0|[1-9][0-9]{0,8})$"}}),
]
