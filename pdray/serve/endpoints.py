"""The two generating endpoints: how a body becomes prompts and parameters, and a result becomes choices."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase

from pdray.errors import InvalidRequestError
from pdray.models.generation_config import SamplingDefaults
from pdray.outputs import CompletionOutput, RequestOutput
from pdray.router.chat_template import ChatOptions, ChatTemplate
from pdray.router.completion import CompletionDelta
from pdray.router.prompt import CompleteText
from pdray.router.tokenization import beside_loop
from pdray.serve.generation import Generation
from pdray.serve.protocol import ChatBody, CompletionBody
from pdray.serve.responses import chat_logprobs, completion_logprobs

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
        super().__init__(body, prompts, params, request_id, model, max_tokens)
        if body.echo and tokenizer is None:
            raise InvalidRequestError("echo needs a tokenizer, and this server has none", "echo")
        self._tokenizer = tokenizer if body.echo else None
        self._num_top = body.logprobs or 0

    def choice(self, index: int, output: RequestOutput, completion: CompletionOutput) -> dict[str, Any]:
        choice = {
            "index": index,
            "text": self._echo(output) + completion.text,
            "logprobs": completion_logprobs(
                completion.token_ids, completion.logprobs, self._num_top, completion.text_offsets
            ),
            "finish_reason": completion.finish_reason,
            "stop_reason": completion.stop_reason,
        }
        if self.body.return_token_ids:
            choice |= {"prompt_token_ids": output.prompt_token_ids, "token_ids": completion.token_ids}
        return choice

    def first_choices(self, index: int, output: RequestOutput) -> list[dict[str, Any]]:
        echo = self._echo(output)
        choice: dict[str, Any] = {"index": index, "text": echo, "logprobs": None, "finish_reason": None}
        if self.body.return_token_ids:
            return [choice | {"prompt_token_ids": output.prompt_token_ids, "token_ids": []}]
        return [choice] if echo else []

    def delta_choices(self, index: int, delta: CompletionDelta) -> list[dict[str, Any]]:
        choice = {
            "index": index,
            "text": delta.text,
            "logprobs": completion_logprobs(delta.token_ids, delta.logprobs, self._num_top, delta.text_offsets),
            "finish_reason": delta.finish_reason,
        }
        if self.body.return_token_ids:
            choice["token_ids"] = delta.token_ids
        return [choice if delta.finish_reason is None else choice | {"stop_reason": delta.stop_reason}]

    def _echo(self, output: RequestOutput) -> str:
        """The prompt's text, if it was asked for. Its ids have been checked: the router has taken them."""
        if self._tokenizer is None:
            return ""
        return str(self._tokenizer.decode(output.prompt_token_ids) if output.prompt is None else output.prompt)


class Chat(Generation):
    """/v1/chat/completions."""

    object_name = "chat.completion"
    chunk_object_name = "chat.completion.chunk"
    prompt_field = "messages"

    def __init__(self, body: ChatBody, prompt: str, request_id: str, model: str, defaults: SamplingDefaults) -> None:
        max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        self._num_top = body.top_logprobs or 0
        params = body.sampling_params(
            max_tokens=max_tokens, logprobs=self._num_top if body.logprobs else None, defaults=defaults.values
        )
        super().__init__(body, [prompt], params, request_id, model, defaults.max_tokens)
        last = body.messages[-1]
        self._echo = last.text if body.echo and last.role == "assistant" else ""

    def prompt_fields(self, output: RequestOutput) -> dict[str, Any]:
        return {"prompt_token_ids": output.prompt_token_ids} if self.body.return_token_ids else {}

    def choice(self, index: int, output: RequestOutput, completion: CompletionOutput) -> dict[str, Any]:
        choice = {
            "index": index,
            "message": {"role": "assistant", "content": self._echo + completion.text, "refusal": None},
            "logprobs": chat_logprobs(completion.token_ids, completion.logprobs, self._num_top),
            "finish_reason": completion.finish_reason,
            "stop_reason": completion.stop_reason,
        }
        return choice | {"token_ids": completion.token_ids} if self.body.return_token_ids else choice

    def first_choices(self, index: int, output: RequestOutput) -> list[dict[str, Any]]:
        delta = {"role": "assistant", "content": self._echo}
        return [{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}]

    def delta_choices(self, index: int, delta: CompletionDelta) -> list[dict[str, Any]]:
        choices: list[dict[str, Any]] = []
        token_ids = {"token_ids": delta.token_ids} if self.body.return_token_ids and delta.token_ids else {}
        if delta.text or delta.logprobs or token_ids:
            choices.append(
                {
                    "index": index,
                    "delta": {"content": delta.text},
                    "logprobs": chat_logprobs(delta.token_ids, delta.logprobs, self._num_top),
                    "finish_reason": None,
                    **token_ids,
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


async def render_chat(body: ChatBody, template: ChatTemplate) -> str:
    """A conversation's prompt. Long ones are rendered beside the event loop.

    Raises:
        InvalidRequestError: see ChatTemplate.render.
    """
    options = ChatOptions(
        add_generation_prompt=body.add_generation_prompt is not False,
        continue_final_message=bool(body.continue_final_message),
        variables=body.chat_template_kwargs or {},
    )
    num_chars = sum(len(text) for message in body.messages for text in message.texts)
    work = num_chars + len(body.messages) * CHARS_PER_MESSAGE
    prompt = await beside_loop(work, lambda: template.render(body.messages, options))
    return str(prompt) if body.add_special_tokens else prompt
