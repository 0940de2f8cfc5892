"""Request bodies of the OpenAI API, with vLLM's extra sampling fields. pdray/serve/fields.py has what is not served."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

import msgspec
from pydantic import BaseModel, ConfigDict, Field, PlainValidator, StrictBool, StrictStr, model_validator
from pydantic.config import JsonDict

from pdray.errors import InvalidRequestError
from pdray.router.conversation import MAX_MESSAGES, MAX_NAME_CHARS, MAX_ROLE_CHARS, Message, parse_messages
from pdray.sampling_params import (
    MAX_BAD_WORDS,
    MAX_INT32,
    MAX_LOGPROBS,
    MAX_N,
    MAX_SALT_CHARS,
    MAX_SEED,
    MIN_SEED,
    SMALLEST_FLOAT32,
    SamplingParams,
)
from pdray.serve.fields import IGNORED, known_fields
from pdray.serve.output_format import ResponseFormat, StructuredOutputs, structured_outputs
from pdray.serve.tools import Choice, Tools
from pdray.serve.values import BadWord, Int32, Integer, LogitBias, Number, Prompts, Stop, TokenId, value_range

MAX_PROMPTS = 128
MAX_COMPLETIONS = 256
MAX_STOP_TOKEN_IDS = 128
MAX_TEMPLATE_BYTES = 16 * 1024

# Fields of SamplingParams that no request has.
MADE_HERE = ("bad_words_token_ids", "structured_outputs_after_thinking", "thinking")

ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class TextPart(BaseModel):
    """A part of a message's content."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["text"]
    text: str


class CalledFunction(BaseModel):
    """What a tool call calls. The arguments are the JSON of an object."""

    model_config = ConfigDict(extra="forbid")

    name: Annotated[str, Field(min_length=1)]
    arguments: str | dict[str, Any] | None = None


class CallInput(BaseModel):
    """An assistant's tool call, for the API's schema; pdray.router.tool_calls checks it."""

    model_config = ConfigDict(extra="forbid")

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(BaseModel):
    """A message, for the API's schema; pdray.router.conversation checks it.

    Attributes:
        content: text parts are joined by newlines where the model's template takes strings. Only an assistant's may be
            null.
        tool_calls, reasoning_content, reasoning: an assistant's.
        tool_call_id: of the call that a message of role tool answers.
        name: for the template, which may have no place for it.
    """

    model_config = ConfigDict(extra="forbid")

    role: Annotated[str, Field(min_length=1, max_length=MAX_ROLE_CHARS)]
    content: str | list[TextPart] | None = None
    name: Annotated[str, Field(max_length=MAX_NAME_CHARS)] | None = None
    refusal: str | None = None
    tool_calls: list[CallInput] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


MessagesInput = Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
Messages = Annotated[list[Message], PlainValidator(parse_messages, json_schema_input_type=MessagesInput)]


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")

    include_usage: StrictBool | None = False
    continuous_usage_stats: StrictBool | None = False
    include_obfuscation: Literal[False] | None = None


def describe_ignored(schema: JsonDict) -> None:
    """Into a body's schema: the fields that are taken whatever they say."""
    properties = schema["properties"]
    assert isinstance(properties, dict)
    for name, why in IGNORED.items():
        properties.setdefault(name, {"description": f"ignored: {why}"})


class GenerationBody(BaseModel):
    """What both endpoints take. Ranges are SamplingParams' business.

    Attributes:
        model: left out, it means the one that is served.
        max_tokens: 0 computes the prompt alone.
        priority: lower goes first.
        prompt_logprobs: answer with the log-probabilities of the prompt's tokens, and of so many most likely ones.
        truncate_prompt_tokens: keep so many tokens at the prompt's end; -1: as many as fit beside max_tokens.
        return_token_ids: answer with the ids of prompt and completions, too.
        thinking_token_budget: end the model's thoughts after so many tokens; -1 sets no limit.
    """

    model_config = ConfigDict(extra="forbid", json_schema_extra=describe_ignored)

    model: StrictStr | None = None
    stream: StrictBool | None = False
    stream_options: StreamOptions | None = None
    n: Annotated[Int32, value_range(1, MAX_N)] | None = 1
    max_tokens: Annotated[Int32, value_range(0, MAX_INT32)] | None = None
    temperature: Annotated[Number, value_range(0, 100)] | None = None
    top_p: Annotated[Number, value_range(SMALLEST_FLOAT32, 1)] | None = None
    top_k: Annotated[Int32, value_range(-1, MAX_INT32)] | None = None
    min_p: Annotated[Number, value_range(0, 1)] | None = None
    presence_penalty: Annotated[Number, value_range(-2, 2)] | None = None
    frequency_penalty: Annotated[Number, value_range(-2, 2)] | None = None
    repetition_penalty: Annotated[Number, value_range(SMALLEST_FLOAT32, 100)] | None = None
    seed: Annotated[Integer, value_range(MIN_SEED, MAX_SEED)] | None = None
    stop: Stop = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOP_TOKEN_IDS)] | None = None
    min_tokens: Annotated[Int32, value_range(0, MAX_INT32)] | None = None
    ignore_eos: StrictBool | None = None
    include_stop_str_in_output: StrictBool | None = None
    skip_special_tokens: StrictBool | None = None
    priority: Int32 | None = 0
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    logit_bias: LogitBias | None = None
    allowed_token_ids: Annotated[list[TokenId], Field(min_length=1)] | None = None
    bad_words: Annotated[list[BadWord], Field(max_length=MAX_BAD_WORDS)] | None = None
    cache_salt: Annotated[StrictStr, Field(min_length=1, max_length=MAX_SALT_CHARS)] | None = None
    prompt_logprobs: Annotated[Int32, value_range(0, MAX_LOGPROBS)] | None = None
    echo: StrictBool | None = False
    return_token_ids: StrictBool | None = False
    truncate_prompt_tokens: Annotated[Int32, value_range(-1, MAX_INT32)] | None = None
    thinking_token_budget: Annotated[Int32, value_range(-1, MAX_INT32)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _check_fields(cls, body: dict[str, Any]) -> dict[str, Any]:
        return known_fields(body, cls.model_fields)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise InvalidRequestError("stream_options is only allowed with stream=true", "stream_options")
        if self.prompt_logprobs is not None and self.stream:
            raise InvalidRequestError("prompt_logprobs is not supported with stream=true", "prompt_logprobs")
        kept = self.truncate_prompt_tokens
        if kept is not None and kept < 1 and kept != -1:
            raise InvalidRequestError(
                f"truncate_prompt_tokens is {kept}; it must be -1, or at least 1", "truncate_prompt_tokens"
            )
        return self

    def sampling_params(
        self, *, max_tokens: int | None, logprobs: int | None, defaults: Mapping[str, Any]
    ) -> SamplingParams:
        """Fields that were left out, or are null, take the defaults given, else SamplingParams'.

        Raises:
            InvalidRequestError: a value is out of range.
        """
        apart = ("max_tokens", "logprobs", "structured_outputs", *MADE_HERE)
        names = [name for name in SamplingParams.__struct_fields__ if name not in apart]
        wanted = structured_outputs(self.response_format, self.structured_outputs)
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        return SamplingParams(
            **{**defaults, **given}, max_tokens=max_tokens, logprobs=logprobs, structured_outputs=wanted
        )


class CompletionBody(GenerationBody):
    """POST /v1/completions.

    Attributes:
        prompt: one or more, each text or token ids.
        echo: begin the text with the prompt's, and logprobs with those of its tokens.
        add_special_tokens: to a text, those that the tokenizer adds by itself, e.g. a first <s>.
    """

    prompt: Prompts
    logprobs: Annotated[Int32, value_range(0, MAX_LOGPROBS)] | None = None
    suffix: StrictStr | None = None
    best_of: Int32 | None = None
    add_special_tokens: StrictBool | None = True

    @model_validator(mode="after")
    def _check_completion(self) -> Self:
        n = 1 if self.n is None else self.n
        if self.suffix:
            raise InvalidRequestError("suffix is not supported", "suffix")
        if self.best_of is not None and self.best_of != n:
            raise InvalidRequestError(f"best_of is {self.best_of}; only best_of = n ({n}) is supported", "best_of")
        if len(self.prompt) > MAX_PROMPTS or len(self.prompt) * n > MAX_COMPLETIONS:
            raise InvalidRequestError(
                f"{len(self.prompt)} prompts with n={n}; one request takes at most {MAX_PROMPTS} prompts and "
                f"{MAX_COMPLETIONS} completions",
                "prompt",
            )
        return self


class ChatBody(GenerationBody):
    """POST /v1/chat/completions.

    Attributes:
        echo: begin the answer with the last message, if it is an assistant's.
        add_special_tokens: on top of those in the model's template.
        chat_template_kwargs: variables for the model's template, e.g. Qwen3's enable_thinking.
        tools, tool_choice, parallel_tool_calls: see pdray.serve.tools.
        reasoning_effort: for the model's template; where that only knows thinking on or off, "none" is off.
        include_reasoning: answer with the model's thoughts.
        separate_reasoning: apart from the content.
    """

    messages: Messages
    max_completion_tokens: Int32 | None = None
    logprobs: StrictBool | None = False
    top_logprobs: Annotated[Int32, value_range(0, MAX_LOGPROBS)] | None = None
    add_special_tokens: StrictBool | None = False
    add_generation_prompt: StrictBool | None = True
    continue_final_message: StrictBool | None = False
    chat_template_kwargs: dict[str, Any] | None = None
    tools: Tools = []
    tool_choice: Choice = None
    parallel_tool_calls: StrictBool | None = True
    reasoning_effort: ReasoningEffort | None = None
    include_reasoning: StrictBool | None = True
    separate_reasoning: StrictBool | None = True

    @model_validator(mode="after")
    def _check_chat(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequestError(f"top_logprobs is {self.top_logprobs}; it needs logprobs=true", "top_logprobs")
        if (size := len(msgspec.json.encode(self.chat_template_kwargs))) > MAX_TEMPLATE_BYTES:
            raise InvalidRequestError(
                f"chat_template_kwargs has {size} bytes of JSON; it may have at most {MAX_TEMPLATE_BYTES}",
                "chat_template_kwargs",
            )
        return self
