"""Request bodies of the OpenAI API, with vLLM's extra sampling fields. Unknown fields are ignored, as by vLLM."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

import msgspec
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    StrictBool,
    StrictInt,
    StrictStr,
    model_validator,
)
from pydantic.fields import FieldInfo

from pdray.errors import InvalidRequestError
from pdray.sampling_params import (
    MAX_LOGPROBS,
    MAX_N,
    MAX_SEED,
    MAX_STOP_STRINGS,
    MIN_SEED,
    SMALLEST_FLOAT32,
    SamplingParams,
)

logger = logging.getLogger(__name__)

MAX_PROMPTS = 128
MAX_COMPLETIONS = 256
MAX_STOP_TOKEN_IDS = 128
MAX_STOP_CHARS = 1024  # every token searches as much text for it
MAX_MESSAGES = 2048
MAX_NAME_CHARS = 64
MAX_TEMPLATE_BYTES = 16 * 1024

MAX_INT32 = 2**31 - 1  # what the wire and the kernels hold

Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Int32 = Annotated[int, Field(strict=True, ge=-(2**31), le=MAX_INT32)]

# They would change the answer, so they are not ignored: anything but null, false or empty is refused.
NOT_SUPPORTED = (
    "allowed_token_ids",
    "audio",
    "bad_words",
    "functions",
    "guided_choice",
    "guided_grammar",
    "guided_json",
    "guided_regex",
    "logit_bias",
    "logits_processors",
    "prompt_logprobs",
    "structured_outputs",
    "tools",
    "truncate_prompt_tokens",
    "use_beam_search",
)


def _in(lowest: float, highest: float) -> FieldInfo:
    """A range for the API's schema; SamplingParams checks it."""
    return Field(json_schema_extra={"minimum": lowest, "maximum": highest})


def _stop(value: Any) -> str | list[str] | None:
    if not (value is None or isinstance(value, str) or (isinstance(value, list) and _all_are(str, value))):
        raise InvalidRequestError("stop must be a string or a list of strings", "stop")
    longest = max((len(each) for each in ([value] if isinstance(value, str) else value or ())), default=0)
    if longest > MAX_STOP_CHARS:
        raise InvalidRequestError(
            f"a stop string has {longest} characters; it may have at most {MAX_STOP_CHARS}", "stop"
        )
    return value


def _prompts(value: Any) -> list[str | list[int]]:
    """One or more prompts of whatever form as a list of prompts."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list):
        if not value:
            raise InvalidRequestError("prompt is an empty list; it must hold at least one prompt or token id", "prompt")
        if _all_are(int, value):
            return [value]
        if _all_are(str, value) or all(isinstance(each, list) and _all_are(int, each) for each in value):
            return value
    raise InvalidRequestError(
        "prompt must be a string, a list of strings, a list of token ids or a list of such lists", "prompt"
    )


def _all_are(kind: type, values: list[Any]) -> bool:
    """Exactly of this type: true is no token id."""
    return all(type(value) is kind for value in values)


def _shown(value: Any) -> str:
    """For an error's text; what is no string may be nested too deep for repr()."""
    return repr(value) if isinstance(value, str) else f"({type(value).__name__})"


def _content(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise InvalidRequestError("a message's content must be a string or a list of parts", "messages")
    texts = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            raise InvalidRequestError(
                f"content parts of type {_shown(kind)} are not supported; only 'text'", "messages"
            )
        if not isinstance(part.get("text"), str):
            raise InvalidRequestError("a content part of type 'text' needs a string in its field text", "messages")
        texts.append(part["text"])
    return "\n".join(texts)


def _format(value: Any) -> str:
    if value != "text":
        raise InvalidRequestError(
            f"response_format of type {_shown(value)} is not supported yet; use 'text'", "response_format"
        )
    return "text"


class TextPart(BaseModel):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
StopInput = StopString | Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS)] | None
PromptInput = str | list[str] | list[int] | list[list[int]]
Stop = Annotated[str | list[str] | None, PlainValidator(_stop, json_schema_input_type=StopInput)]
Prompts = Annotated[list[str | list[int]], PlainValidator(_prompts, json_schema_input_type=PromptInput)]
Content = Annotated[str | None, PlainValidator(_content, json_schema_input_type=str | list[TextPart] | None)]


class StreamOptions(BaseModel):
    include_usage: StrictBool | None = False
    continuous_usage_stats: StrictBool | None = False


class ResponseFormat(BaseModel):
    type: Annotated[str, PlainValidator(_format, json_schema_input_type=Literal["text"])]


class GenerationBody(BaseModel):
    """What both endpoints take. Ranges are SamplingParams' business.

    Attributes:
        model: left out, it means the one that is served.
        priority: lower goes first.
    """

    model_config = ConfigDict(extra="allow")  # until they have been looked at

    model: StrictStr | None = None
    stream: StrictBool | None = False
    stream_options: StreamOptions | None = None
    n: Annotated[Int32, _in(1, MAX_N)] | None = 1
    max_tokens: Annotated[Int32, _in(1, MAX_INT32)] | None = None
    temperature: Annotated[Number, _in(0, 100)] | None = None
    top_p: Annotated[Number, _in(SMALLEST_FLOAT32, 1)] | None = None
    top_k: Annotated[Int32, _in(-1, MAX_INT32)] | None = None
    min_p: Annotated[Number, _in(0, 1)] | None = None
    presence_penalty: Annotated[Number, _in(-2, 2)] | None = None
    frequency_penalty: Annotated[Number, _in(-2, 2)] | None = None
    repetition_penalty: Annotated[Number, _in(SMALLEST_FLOAT32, 100)] | None = None
    seed: Annotated[StrictInt, _in(MIN_SEED, MAX_SEED)] | None = None
    stop: Stop = None
    stop_token_ids: Annotated[list[Annotated[Int32, Field(ge=0)]], Field(max_length=MAX_STOP_TOKEN_IDS)] | None = None
    min_tokens: Annotated[Int32, _in(0, MAX_INT32)] | None = None
    ignore_eos: StrictBool | None = None
    include_stop_str_in_output: StrictBool | None = None
    skip_special_tokens: StrictBool | None = None
    priority: Int32 | None = 0
    response_format: ResponseFormat | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise InvalidRequestError("stream_options is only allowed with stream=true", "stream_options")
        extra = self.model_extra or {}
        for name, value in extra.items():
            if name in NOT_SUPPORTED and value is not None and value is not False and value not in ("", [], {}):
                raise InvalidRequestError(f"{name} is not supported yet", name)
        if extra:
            logger.debug("ignored unknown fields: %s", ", ".join(sorted(extra)))
            extra.clear()  # the request lives long, and they may be many times the body's size
        return self

    def sampling_params(
        self, *, max_tokens: int | None, logprobs: int | None, defaults: Mapping[str, Any]
    ) -> SamplingParams:
        """Fields that were left out, or are null, take the defaults given, else SamplingParams'.

        Raises:
            InvalidRequestError: a value is out of range.
        """
        names = [name for name in SamplingParams.__struct_fields__ if name not in ("max_tokens", "logprobs")]
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        return SamplingParams(**{**defaults, **given}, max_tokens=max_tokens, logprobs=logprobs)


class CompletionBody(GenerationBody):
    """POST /v1/completions.

    Attributes:
        prompt: one or more, each text or token ids.
    """

    prompt: Prompts
    logprobs: Annotated[Int32, _in(0, MAX_LOGPROBS)] | None = None
    echo: StrictBool | None = False
    suffix: StrictStr | None = None
    best_of: Int32 | None = None

    @model_validator(mode="after")
    def _check_completion(self) -> Self:
        n = 1 if self.n is None else self.n
        if self.suffix:
            raise InvalidRequestError("suffix is not supported", "suffix")
        if self.best_of is not None and self.best_of != n:
            raise InvalidRequestError(f"best_of is {self.best_of}; only best_of = n ({n}) is supported", "best_of")
        if self.echo and self.logprobs is not None:
            raise InvalidRequestError(
                "echo together with logprobs is not supported: prompt logprobs are not computed", "echo"
            )
        if len(self.prompt) > MAX_PROMPTS or len(self.prompt) * n > MAX_COMPLETIONS:
            raise InvalidRequestError(
                f"{len(self.prompt)} prompts with n={n}; one request takes at most {MAX_PROMPTS} prompts and "
                f"{MAX_COMPLETIONS} completions",
                "prompt",
            )
        return self


class ChatMessage(BaseModel):
    """Attributes:
    content: text parts joined by newlines, as vLLM does; only an assistant's may be null.
    """

    model_config = ConfigDict(extra="allow")

    role: Annotated[StrictStr, Field(min_length=1, max_length=64)]
    content: Content = None
    name: Annotated[StrictStr, Field(max_length=MAX_NAME_CHARS)] | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        extra = self.model_extra or {}
        if extra.get("tool_calls") or extra.get("function_call") or self.role in ("tool", "function"):
            raise InvalidRequestError("messages with tool calls or their results are not supported yet", "messages")
        if self.content is None and self.role != "assistant":
            raise InvalidRequestError(f"a message of role {self.role!r} has no content", "messages")
        extra.clear()
        return self

    def plain(self) -> dict[str, str]:
        """For the chat template."""
        message = {"role": self.role, "content": self.content or ""}
        return message if self.name is None else message | {"name": self.name}


class ChatBody(GenerationBody):
    """POST /v1/chat/completions.

    Attributes:
        chat_template_kwargs: variables for the model's template, e.g. Qwen3's enable_thinking.
    """

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Int32 | None = None
    logprobs: StrictBool | None = False
    top_logprobs: Annotated[Int32, _in(0, MAX_LOGPROBS)] | None = None
    add_generation_prompt: StrictBool = True
    continue_final_message: StrictBool = False
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _check_chat(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequestError("top_logprobs needs logprobs=true", "top_logprobs")
        if (size := len(msgspec.json.encode(self.chat_template_kwargs))) > MAX_TEMPLATE_BYTES:
            raise InvalidRequestError(
                f"chat_template_kwargs has {size} bytes of JSON; it may have at most {MAX_TEMPLATE_BYTES}",
                "chat_template_kwargs",
            )
        if self.add_generation_prompt and self.continue_final_message:
            raise InvalidRequestError(
                "continue_final_message needs add_generation_prompt=false", "continue_final_message"
            )
        return self
