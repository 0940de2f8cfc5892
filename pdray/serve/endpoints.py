"""The two generating endpoints: how a body becomes prompts and parameters, and a result becomes choices."""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec
from transformers import PreTrainedTokenizerBase

from pdray.config import Config
from pdray.errors import InvalidRequestError
from pdray.models.generation_config import SamplingDefaults
from pdray.outputs import CompletionOutput, RequestOutput
from pdray.router.chat_template import ChatOptions, ChatTemplate
from pdray.router.completion import CompletionDelta
from pdray.router.prompt import CompleteText
from pdray.router.tokenization import beside_loop
from pdray.sampling_params import NO_BUDGET, SamplingParams
from pdray.serve.answer_format import answer_format, check_tools, effort_variables, where_it_thinks
from pdray.serve.chat_answer import ChatStream, whole_message
from pdray.serve.echo import Echo
from pdray.serve.generation import Generation
from pdray.serve.output_format import structured_outputs
from pdray.serve.parsers.answer import AnswerFormat
from pdray.serve.parsers.forced_call import forced_call
from pdray.serve.protocol import ChatBody, CompletionBody
from pdray.serve.responses import chat_logprobs, completion_logprobs, joined_logprobs, prompt_logprobs
from pdray.serve.tools import choose
from pdray.structured_outputs import StructuredOutputsParams
from pdray.thinking import has_thoughts

DEFAULT_COMPLETION_TOKENS = 16
CHARS_PER_MESSAGE = 64  # to render a message takes as long as to tokenize so many


class Completion(Generation):
    """/v1/completions."""

    object_name = chunk_object_name = "text_completion"
    prompt_field = "prompt"

    def __init__(
        self,
        body: CompletionBody,
        request_id: str,
        model: str,
        tokenizer: PreTrainedTokenizerBase | None,
        defaults: SamplingDefaults,
    ) -> None:
        params = body.sampling_params(max_tokens=body.max_tokens, logprobs=body.logprobs, defaults=defaults.values)
        max_tokens = DEFAULT_COMPLETION_TOKENS if defaults.max_tokens is None else defaults.max_tokens
        prompts = body.prompt
        if body.add_special_tokens is False:
            prompts = [CompleteText(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
        if body.echo and body.logprobs is not None:
            most = max(body.logprobs, body.prompt_logprobs or 0)
            params = msgspec.structs.replace(params, prompt_logprobs=most)
        super().__init__(body, prompts, params, request_id, model, max_tokens)
        if body.echo and tokenizer is None:
            raise InvalidRequestError("echo needs a tokenizer, and this server has none", "echo")
        self._echo = Echo(tokenizer, body.logprobs) if body.echo and tokenizer is not None else None
        self._num_top = body.logprobs or 0
        self._awaited: dict[int, RequestOutput] = {}  # prompts that are echoed when their logprobs are known
        self._shifts: dict[int, int] = {}  # characters before a choice's own text

    def choice(self, index: int, output: RequestOutput, completion: CompletionOutput) -> dict[str, Any]:
        text, logprobs = (
            completion.text,
            completion_logprobs(completion.token_ids, completion.logprobs, self._num_top, completion.text_offsets),
        )
        if self._echo is not None:
            echo = self._echo.text(output)
            text, first = echo + text, self._echo.logprobs(output)
            logprobs = logprobs if first is None else joined_logprobs(first, logprobs, len(echo))
        choice = {
            "index": index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": completion.finish_reason,
            "stop_reason": completion.stop_reason,
        }
        if self.body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs(output.prompt_logprobs or [], self.body.prompt_logprobs)
        if self.body.return_token_ids:
            choice |= {"prompt_token_ids": output.prompt_token_ids, "token_ids": completion.token_ids}
        return choice

    def first_choices(self, index: int, output: RequestOutput) -> list[dict[str, Any]]:
        if self._echo is not None and self._echo.num_top is not None:
            self._awaited[index] = output
            return []
        return self._prompt_choices(index, output)

    def _prompt_choices(self, index: int, output: RequestOutput) -> list[dict[str, Any]]:
        echo = "" if self._echo is None else self._echo.text(output)
        logprobs = None if self._echo is None else self._echo.logprobs(output)
        self._shifts[index] = len(echo)
        choice: dict[str, Any] = {"index": index, "text": echo, "logprobs": logprobs, "finish_reason": None}
        if self.body.return_token_ids:
            return [choice | {"prompt_token_ids": output.prompt_token_ids, "token_ids": []}]
        return [choice] if echo or logprobs else []

    def delta_choices(self, index: int, delta: CompletionDelta) -> list[dict[str, Any]]:
        prompt = self._awaited.pop(index, None)
        first = [] if prompt is None else self._prompt_choices(index, prompt)
        offsets = [offset + self._shifts.get(index, 0) for offset in delta.text_offsets or ()]
        choice = {
            "index": index,
            "text": delta.text,
            "logprobs": completion_logprobs(delta.token_ids, delta.logprobs, self._num_top, offsets),
            "finish_reason": delta.finish_reason,
        }
        if self.body.return_token_ids:
            choice["token_ids"] = delta.token_ids
        return [*first, choice if delta.finish_reason is None else choice | {"stop_reason": delta.stop_reason}]


class Chat(Generation):
    """/v1/chat/completions."""

    object_name = "chat.completion"
    chunk_object_name = "chat.completion.chunk"
    prompt_field = "messages"

    def __init__(
        self, body: ChatBody, chat: RenderedChat, request_id: str, model: str, defaults: SamplingDefaults
    ) -> None:
        max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        self._num_top = body.top_logprobs or 0
        params = body.sampling_params(
            max_tokens=max_tokens, logprobs=self._num_top if body.logprobs else None, defaults=defaults.values
        )
        super().__init__(body, [chat.prompt], form(params, chat), request_id, model, defaults.max_tokens)
        last = body.messages[-1]
        self._echo = last.text if body.echo and last.role == "assistant" else ""
        self._format = chat.format
        self._include_reasoning = body.include_reasoning is not False
        self._streams: dict[int, ChatStream] = {}

    def _stream_of(self, index: int) -> ChatStream:
        """The deltas of choice number `index`."""
        if index not in self._streams:
            self._streams[index] = ChatStream(self._format, include_reasoning=self._include_reasoning)
        return self._streams[index]

    def prompt_fields(self, output: RequestOutput) -> dict[str, Any]:
        fields: dict[str, Any] = {"prompt_token_ids": output.prompt_token_ids} if self.body.return_token_ids else {}
        if self.body.prompt_logprobs is not None:
            fields["prompt_logprobs"] = prompt_logprobs(output.prompt_logprobs or [], self.body.prompt_logprobs)
        return fields

    def choice(self, index: int, output: RequestOutput, completion: CompletionOutput) -> dict[str, Any]:
        stream = self._stream_of(index)
        deltas = stream.deltas(completion.text, completion.finish_reason or "abort")
        choice = {
            "index": index,
            "message": whole_message(deltas, echo=self._echo),
            "logprobs": chat_logprobs(completion.token_ids, completion.logprobs, self._num_top),
            "finish_reason": stream.finish_reason(completion.finish_reason),
            "stop_reason": completion.stop_reason,
        }
        return choice | {"token_ids": completion.token_ids} if self.body.return_token_ids else choice

    def first_choices(self, index: int, output: RequestOutput) -> list[dict[str, Any]]:
        delta = {"role": "assistant", "content": self._echo}
        return [{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}]

    def delta_choices(self, index: int, delta: CompletionDelta) -> list[dict[str, Any]]:
        stream = self._stream_of(index)
        deltas = stream.deltas(delta.text, delta.finish_reason)
        token_ids = {"token_ids": delta.token_ids} if self.body.return_token_ids and delta.token_ids else {}
        if not deltas and (delta.logprobs or token_ids):
            deltas = [{"content": ""}]  # text that is held back, or none: a token that a parser has taken in
        choices: list[dict[str, Any]] = [
            {"index": index, "delta": each, "logprobs": None, "finish_reason": None, **({} if i else token_ids)}
            for i, each in enumerate(deltas)
        ]
        if choices:
            choices[0]["logprobs"] = chat_logprobs(delta.token_ids, delta.logprobs, self._num_top)
        if delta.finish_reason is not None:
            choices.append(
                {
                    "index": index,
                    "delta": {},
                    "logprobs": None,
                    "finish_reason": stream.finish_reason(delta.finish_reason),
                    "stop_reason": delta.stop_reason,
                }
            )
        return choices


class RenderedChat(NamedTuple):
    """Attributes:
    format: how its answers are written.
    schema: that forces a call, if one is forced.
    thinks_first: what the answer must match comes behind the model's thoughts.
    """

    prompt: str
    format: AnswerFormat
    schema: dict[str, Any] | None
    thinks_first: bool


async def render_chat(body: ChatBody, template: ChatTemplate, config: Config) -> RenderedChat:
    """A conversation's prompt. Long ones are rendered beside the event loop.

    Raises:
        InvalidRequestError: see ChatTemplate.render, choose and answer_format.
    """
    choice, tools = choose(body.tools, body.tool_choice)
    if tools:
        check_tools(config, template)
    given = body.chat_template_kwargs or {}
    options = ChatOptions(
        add_generation_prompt=body.add_generation_prompt is not False,
        continue_final_message=bool(body.continue_final_message),
        variables=effort_variables(body.reasoning_effort, given, template),
        tools=[tool.as_dict() for tool in tools and body.tools],
    )
    num_chars = sum(len(text) for message in body.messages for text in message.texts)
    work = num_chars + (len(body.messages) + len(body.tools)) * CHARS_PER_MESSAGE
    prompt = await beside_loop(work, lambda: template.render(body.messages, options))
    parallel = body.parallel_tool_calls is not False
    schema = forced_call(tools, choice, parallel=parallel)
    is_formed = schema is not None or structured_outputs(body.response_format, body.structured_outputs) is not None
    thinking = where_it_thinks(
        config, template, prompt, separate=body.separate_reasoning is not False, is_formed=is_formed
    )
    if body.thinking_token_budget not in (None, NO_BUDGET) and not has_thoughts(
        config.reasoning_parser, template.source
    ):
        raise InvalidRequestError(
            f"thinking_token_budget is {body.thinking_token_budget}, but this model's thoughts are not told apart "
            "(reasoning_parser); leave it out",
            "thinking_token_budget",
        )
    how = answer_format(config, template, tools=tools, choice=choice, parallel=parallel, thinking=thinking)
    rendered = str(prompt) if body.add_special_tokens else prompt
    return RenderedChat(rendered, how, schema, is_formed and thinking is not None)


def form(params: SamplingParams, chat: RenderedChat) -> SamplingParams:
    """The same parameters with the form that the conversation's answer must have."""
    if chat.thinks_first:
        params = msgspec.structs.replace(params, structured_outputs_after_thinking=True)
    return force(params, chat.schema)


def force(params: SamplingParams, schema: dict[str, Any] | None) -> SamplingParams:
    """The same parameters with the schema as what the answer must match.

    Raises:
        InvalidRequestError: the request asks for another form, too.
    """
    if schema is None:
        return params
    if params.structured_outputs is not None:
        raise InvalidRequestError(
            "tool_choice forces a call, and response_format or structured_outputs another form; leave one of them out",
            "tool_choice",
        )
    # Without spaces, which small models repeat to no end where they are free to.
    forced = StructuredOutputsParams(json=schema, disable_any_whitespace=True)
    return msgspec.structs.replace(params, structured_outputs=forced)
