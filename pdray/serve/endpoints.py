"""The two generating endpoints: how a body becomes prompts and parameters, and a result becomes choices."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from transformers import PreTrainedTokenizerBase

from pdray.errors import InvalidRequestError
from pdray.models.generation_config import SamplingDefaults
from pdray.outputs import CompletionOutput, RequestOutput
from pdray.router.completion import CompletionDelta
from pdray.router.tokenization import beside_loop, encoder_of
from pdray.serve.generation import Generation
from pdray.serve.protocol import ChatBody, CompletionBody
from pdray.serve.responses import chat_logprobs, completion_logprobs

DEFAULT_COMPLETION_TOKENS = 16
# Arguments of the renderer, which a request must not set; any other name is the template's own variable.
TEMPLATE_OPTIONS = {*inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters, "messages"}


class Completion(Generation):
    """/v1/completions."""

    object_name = chunk_object_name = "text_completion"

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
        super().__init__(body, body.prompt, params, request_id, model, max_tokens)
        if body.echo and tokenizer is None:
            raise InvalidRequestError("echo needs a tokenizer, and this server has none", "echo")
        self._tokenizer = tokenizer if body.echo else None
        self._num_top = body.logprobs or 0

    def choice(self, index: int, output: RequestOutput, completion: CompletionOutput) -> dict[str, Any]:
        return {
            "index": index,
            "text": self._echo(output) + completion.text,
            "logprobs": completion_logprobs(
                completion.token_ids, completion.logprobs, self._num_top, completion.text_offsets
            ),
            "finish_reason": completion.finish_reason,
            "stop_reason": completion.stop_reason,
        }

    def first_choices(self, index: int, output: RequestOutput) -> list[dict[str, Any]]:
        echo = self._echo(output)
        return [{"index": index, "text": echo, "logprobs": None, "finish_reason": None}] if echo else []

    def delta_choices(self, index: int, delta: CompletionDelta) -> list[dict[str, Any]]:
        choice = {
            "index": index,
            "text": delta.text,
            "logprobs": completion_logprobs(delta.token_ids, delta.logprobs, self._num_top, delta.text_offsets),
            "finish_reason": delta.finish_reason,
        }
        return [choice if delta.finish_reason is None else choice | {"stop_reason": delta.stop_reason}]

    def _echo(self, output: RequestOutput) -> str:
        """The prompt's text, if it was asked for. Its ids have been checked: the router has taken them."""
        if self._tokenizer is None:
            return ""
        return output.prompt if output.prompt is not None else str(self._tokenizer.decode(output.prompt_token_ids))


class Chat(Generation):
    """/v1/chat/completions."""

    object_name = "chat.completion"
    chunk_object_name = "chat.completion.chunk"

    def __init__(
        self, body: ChatBody, prompt_token_ids: list[int], request_id: str, model: str, defaults: SamplingDefaults
    ) -> None:
        max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        self._num_top = body.top_logprobs or 0
        params = body.sampling_params(
            max_tokens=max_tokens, logprobs=self._num_top if body.logprobs else None, defaults=defaults.values
        )
        super().__init__(body, [prompt_token_ids], params, request_id, model, defaults.max_tokens)

    def choice(self, index: int, output: RequestOutput, completion: CompletionOutput) -> dict[str, Any]:
        return {
            "index": index,
            "message": {"role": "assistant", "content": completion.text, "refusal": None},
            "logprobs": chat_logprobs(completion.token_ids, completion.logprobs, self._num_top),
            "finish_reason": completion.finish_reason,
            "stop_reason": completion.stop_reason,
        }

    def first_choices(self, index: int, output: RequestOutput) -> list[dict[str, Any]]:
        delta = {"role": "assistant", "content": ""}
        return [{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}]

    def delta_choices(self, index: int, delta: CompletionDelta) -> list[dict[str, Any]]:
        choices: list[dict[str, Any]] = []
        if delta.text or delta.logprobs:
            choices.append(
                {
                    "index": index,
                    "delta": {"content": delta.text},
                    "logprobs": chat_logprobs(delta.token_ids, delta.logprobs, self._num_top),
                    "finish_reason": None,
                }
            )
        if delta.finish_reason is not None:
            choices.append(
                {
                    "index": index,
                    "delta": {},
                    "logprobs": None,
                    "finish_reason": delta.finish_reason,
                    "stop_reason": delta.stop_reason,
                }
            )
        return choices


async def render_chat(
    body: ChatBody, tokenizer: PreTrainedTokenizerBase | None, max_model_len: int | None
) -> list[int]:
    """Token ids of a conversation in the model's own chat template. Long ones are rendered beside the event loop.

    Raises:
        InvalidRequestError: there is no template, it refuses the conversation, or the prompt is too long.
    """
    if tokenizer is None or not tokenizer.chat_template:
        raise InvalidRequestError("this model has no chat template; use /v1/completions", "messages")
    for name in body.chat_template_kwargs or ():
        if name in TEMPLATE_OPTIONS:
            raise InvalidRequestError(f"{name} is no variable of a chat template", "chat_template_kwargs")
    render = functools.partial(
        tokenizer.apply_chat_template,
        [message.plain() for message in body.messages],
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
        tokenize=False,
        **(body.chat_template_kwargs or {}),
    )
    num_chars = sum(len(each.role) + len(each.name or "") + len(each.content or "") for each in body.messages)

    def token_ids() -> list[int]:
        try:
            text: Any = render()
        except (
            Exception
        ) as error:  # templates are programs of the model's authors: any error is the conversation's fault
            raise InvalidRequestError(
                f"the model's chat template refuses these messages: {error}", "messages"
            ) from error
        return encoder_of(tokenizer).encode(text, max_model_len, add_special_tokens=False)

    return await beside_loop(num_chars, token_ids)
