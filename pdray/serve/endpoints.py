"""The two generating endpoints: how a body becomes prompts and parameters, and a result becomes choices."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase

from pdray.errors import InvalidRequestError
from pdray.outputs import CompletionOutput
from pdray.router.request import CompletionDelta
from pdray.serve.generation import Generation
from pdray.serve.protocol import ChatBody, CompletionBody
from pdray.serve.responses import chat_logprobs, completion_logprobs

DEFAULT_COMPLETION_TOKENS = 16


class Completion(Generation):
    """/v1/completions."""

    object_name = chunk_object_name = "text_completion"

    def __init__(
        self, body: CompletionBody, request_id: str, model: str, tokenizer: PreTrainedTokenizerBase | None
    ) -> None:
        max_tokens = DEFAULT_COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
        params = body.sampling_params(max_tokens=max_tokens, logprobs=body.logprobs)
        super().__init__(body, body.prompts, params, request_id, model)
        self._num_top = body.logprobs or 0
        self._echo = ["" for _ in self.prompts]
        if body.echo:
            if tokenizer is None:
                raise InvalidRequestError("echo needs a tokenizer, and this server has none", "echo")
            self._echo = [p if isinstance(p, str) else str(tokenizer.decode(p)) for p in self.prompts]
        self._text_lengths: dict[int, int] = {}

    def choice(self, index: int, prompt_index: int, completion: CompletionOutput) -> dict[str, Any]:
        return {
            "index": index,
            "text": self._echo[prompt_index] + completion.text,
            "logprobs": completion_logprobs(completion.token_ids, completion.logprobs, self._num_top, 0),
            "finish_reason": completion.finish_reason,
            "stop_reason": completion.stop_reason,
        }

    def first_choices(self, index: int, prompt_index: int) -> list[dict[str, Any]]:
        echo = self._echo[prompt_index]
        return [{"index": index, "text": echo, "logprobs": None, "finish_reason": None}] if echo else []

    def delta_choices(self, index: int, prompt_index: int, delta: CompletionDelta) -> list[dict[str, Any]]:
        offset = self._text_lengths.get(index, 0)
        if delta.logprobs is not None:
            texts = (step[t].decoded_token for t, step in zip(delta.token_ids, delta.logprobs, strict=True))
            self._text_lengths[index] = offset + sum(len(text or "") for text in texts)
        choice = {
            "index": index,
            "text": delta.text,
            "logprobs": completion_logprobs(delta.token_ids, delta.logprobs, self._num_top, offset),
            "finish_reason": delta.finish_reason,
        }
        return [choice if delta.finish_reason is None else choice | {"stop_reason": delta.stop_reason}]


class Chat(Generation):
    """/v1/chat/completions."""

    object_name = "chat.completion"
    chunk_object_name = "chat.completion.chunk"

    def __init__(self, body: ChatBody, request_id: str, model: str, tokenizer: PreTrainedTokenizerBase | None) -> None:
        max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        self._num_top = body.top_logprobs or 0
        params = body.sampling_params(max_tokens=max_tokens, logprobs=self._num_top if body.logprobs else None)
        super().__init__(body, [render_chat(body, tokenizer)], params, request_id, model)

    def choice(self, index: int, prompt_index: int, completion: CompletionOutput) -> dict[str, Any]:
        return {
            "index": index,
            "message": {"role": "assistant", "content": completion.text, "refusal": None},
            "logprobs": chat_logprobs(completion.token_ids, completion.logprobs, self._num_top),
            "finish_reason": completion.finish_reason,
            "stop_reason": completion.stop_reason,
        }

    def first_choices(self, index: int, prompt_index: int) -> list[dict[str, Any]]:
        delta = {"role": "assistant", "content": ""}
        return [{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}]

    def delta_choices(self, index: int, prompt_index: int, delta: CompletionDelta) -> list[dict[str, Any]]:
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


def render_chat(body: ChatBody, tokenizer: PreTrainedTokenizerBase | None) -> list[int]:
    """Token ids of a conversation in the model's own chat template.

    Raises:
        InvalidRequestError: there is no template, or it refuses the conversation.
    """
    if tokenizer is None or not tokenizer.chat_template:
        raise InvalidRequestError("this model has no chat template; use /v1/completions", "messages")
    try:
        ids = tokenizer.apply_chat_template(
            [message.plain() for message in body.messages],
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message,
            return_dict=False,
        )
    except Exception as error:  # templates are programs of the model's authors: any error is the conversation's fault
        raise InvalidRequestError(f"the model's chat template refuses these messages: {error}", "messages") from error
    assert isinstance(ids, list)
    return [int(token_id) for token_id in ids]  # type: ignore[arg-type]
