"""Request bodies of the OpenAI API, with vLLM's extra sampling fields. Unknown fields are ignored, as by vLLM."""

from __future__ import annotations

import json
import logging
from typing import Annotated, Any, Literal, Self, TypeVar

from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, model_validator

from pdray.sampling_params import SamplingParams
from pdray.serve.errors import ApiError

logger = logging.getLogger(__name__)

Body = TypeVar("Body", bound="GenerationBody")

MAX_PROMPTS = 128
MAX_COMPLETIONS = 256
Number = Annotated[float, Field(strict=False, allow_inf_nan=False)]


class StreamOptions(BaseModel):
    include_usage: StrictBool = False
    continuous_usage_stats: StrictBool = False


class GenerationBody(BaseModel):
    """What both endpoints take. Ranges are SamplingParams' business."""

    model_config = ConfigDict(extra="allow")

    model: StrictStr
    stream: StrictBool | None = False
    stream_options: StreamOptions | None = None
    n: StrictInt | None = 1
    max_tokens: StrictInt | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    top_k: StrictInt | None = None
    min_p: Number | None = None
    presence_penalty: Number | None = None
    frequency_penalty: Number | None = None
    repetition_penalty: Number | None = None
    seed: StrictInt | None = None
    stop: StrictStr | list[StrictStr] | None = None
    stop_token_ids: list[StrictInt] | None = None
    min_tokens: StrictInt | None = None
    ignore_eos: StrictBool | None = None
    include_stop_str_in_output: StrictBool | None = None
    skip_special_tokens: StrictBool | None = None
    priority: StrictInt = 0
    logit_bias: dict[str, Any] | None = None
    response_format: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only allowed with stream=true")
        if self.logit_bias:
            raise ValueError("logit_bias is not supported")
        if self.response_format is not None and self.response_format.get("type", "text") != "text":
            raise ValueError(f"response_format {self.response_format.get('type')!r} is not supported yet; use text")
        if self.model_extra:
            logger.debug("ignored unknown fields: %s", ", ".join(sorted(self.model_extra)))
        return self

    def sampling_params(self, *, max_tokens: int | None, logprobs: int | None) -> SamplingParams:
        """Fields that were left out, or are null, take SamplingParams' defaults.

        Raises:
            InvalidRequestError: a value is out of range.
        """
        names = [name for name in SamplingParams.__struct_fields__ if name not in ("max_tokens", "logprobs")]
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        return SamplingParams(**given, max_tokens=max_tokens, logprobs=logprobs)


class CompletionBody(GenerationBody):
    """POST /v1/completions."""

    prompt: StrictStr | list[StrictInt] | list[StrictStr] | list[list[StrictInt]]
    logprobs: StrictInt | None = None
    echo: StrictBool | None = False
    suffix: StrictStr | None = None
    best_of: StrictInt | None = None

    @model_validator(mode="after")
    def _check_completion(self) -> Self:
        if self.suffix:
            raise ValueError("suffix is not supported")
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError(f"best_of is {self.best_of}; only best_of equal to n ({self.n or 1}) is supported")
        if self.echo and self.logprobs is not None:
            raise ValueError("echo together with logprobs is not supported: prompt logprobs are not computed")
        if len(self.prompts) > MAX_PROMPTS or len(self.prompts) * (self.n or 1) > MAX_COMPLETIONS:
            raise ValueError(
                f"{len(self.prompts)} prompts with n={self.n}; at most {MAX_PROMPTS} prompts and "
                f"{MAX_COMPLETIONS} completions in one request"
            )
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str) or (self.prompt and isinstance(self.prompt[0], int)):
            return [self.prompt]
        return [*self.prompt]


class TextPart(BaseModel):
    type: Literal["text"]
    text: StrictStr


class ChatMessage(BaseModel):
    model_config = ConfigDict(extra="allow")

    role: Annotated[StrictStr, Field(min_length=1, max_length=64)]
    content: StrictStr | list[TextPart] | None = None

    def plain(self) -> dict[str, Any]:
        """For the chat template: content as one text."""
        parts = self.content if isinstance(self.content, list) else None
        content = "\n".join(part.text for part in parts) if parts is not None else (self.content or "")
        return {"role": self.role, "content": content}


class ChatBody(GenerationBody):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: StrictInt | None = None
    logprobs: StrictBool | None = False
    top_logprobs: StrictInt | None = None
    add_generation_prompt: StrictBool = True
    continue_final_message: StrictBool = False
    tools: list[Any] | None = None

    @model_validator(mode="after")
    def _check_chat(self) -> Self:
        if self.tools:
            raise ValueError("tools are not supported yet")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs=true")
        if self.add_generation_prompt and self.continue_final_message:
            raise ValueError("continue_final_message needs add_generation_prompt=false")
        return self


async def read_body(request: Request, kind: type[Body], max_bytes: int) -> Body:
    """The request's body, checked.

    Raises:
        ApiError: 413 as soon as it is too large, 400 if it is no JSON object. ValidationError: 400.
    """
    raw = bytearray()
    async for chunk in request.stream():
        raw += chunk
        if len(raw) > max_bytes:
            raise ApiError(413, f"the body is larger than {max_bytes} bytes (max_request_bytes)")
    try:
        body = json.loads(raw.decode("utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is no valid JSON: {error}") from None
    if not isinstance(body, dict):
        raise ApiError(400, f"the body is a JSON {type(body).__name__}; it must be an object")
    _refuse_surrogates(raw)
    return kind.model_validate(body)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON value")


def _refuse_surrogates(raw: bytearray) -> None:
    """A lone surrogate, written as an escape, is valid JSON and yet no text that could be encoded."""
    if b"\\u" in raw:
        try:
            json.dumps(json.loads(raw.decode("utf-8")), ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise ApiError(400, "the body has a lone surrogate; it must be valid Unicode") from None
