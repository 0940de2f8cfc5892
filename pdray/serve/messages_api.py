"""/v1/messages: Anthropic's Messages API."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from pdray.models.generation_config import SamplingDefaults
from pdray.outputs import CompletionOutput, RequestOutput
from pdray.router.completion import CompletionDelta
from pdray.router.routed import RoutedRequest
from pdray.serve.endpoints import RenderedChat, form
from pdray.serve.errors import anthropic_body, to_api_error
from pdray.serve.generation import Generation, merged
from pdray.serve.messages_output import MessageOutput
from pdray.serve.own_names import OwnNames
from pdray.serve.parsers.answer import AnswerParser
from pdray.serve.protocol import ChatBody
from pdray.serve.responses import encode_json, one_line


class Messages(Generation):
    """One message."""

    prompt_field = "messages"

    def __init__(
        self,
        chat_body: ChatBody,
        chat: RenderedChat,
        request_id: str,
        model: str,
        defaults: SamplingDefaults,
        names: OwnNames,
    ) -> None:
        params = chat_body.sampling_params(
            max_tokens=chat_body.max_completion_tokens, logprobs=None, defaults=defaults.values
        )
        super().__init__(chat_body, [chat.prompt], form(params, chat), request_id, model, defaults.max_tokens)
        self._format = chat.format
        self._names = names

    def choice(self, index: int, output: RequestOutput, completion: CompletionOutput) -> dict[str, Any]:
        raise AssertionError("a message has no choices")

    def delta_choices(self, index: int, delta: CompletionDelta) -> list[dict[str, Any]]:
        raise AssertionError("a message has no choices")

    def answer(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        [output] = outputs
        [completion] = output.outputs
        parser, blocks = self._format.parser(), MessageOutput()
        blocks.take(parser.feed(completion.text) + parser.finish())
        blocks.close()
        return self._message(blocks.content) | self._end(completion, parser) | {"usage": _usage(output)}

    async def stream(self, requests: list[RoutedRequest]) -> AsyncGenerator[bytes, None]:
        """Server-sent events; an error after the start is an event, for the status has been sent."""
        [request] = requests
        parser, blocks = self._format.parser(), MessageOutput()
        try:
            begun = self._message([]) | {"usage": _usage(request.output) | {"output_tokens": 0}}
            yield _event({"type": "message_start", "message": begun})
            async with contextlib.aclosing(merged([request])) as arriving:
                async for _, deltas in arriving:
                    for delta in deltas:
                        for each in blocks.take(parser.feed(delta.text)):
                            yield _event(each)
            for each in blocks.take(parser.finish()) + blocks.close():
                yield _event(each)
            end = self._end(request.output.outputs[0], parser)
            yield _event({"type": "message_delta", "delta": end, "usage": _usage(request.output)})
            yield _event({"type": "message_stop"})
        except Exception as error:
            told = to_api_error(error)
            told.body["error"]["message"] = self._names.text(told.body["error"]["message"] or "")
            yield _event(anthropic_body(told, self.request_id))

    def _message(self, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.request_id,
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": content,
            "stop_reason": None,
            "stop_sequence": None,
        }

    @staticmethod
    def _end(completion: CompletionOutput, parser: AnswerParser) -> dict[str, Any]:
        """Why it ended. A stop token id is the model's own end, as Anthropic's has no such thing."""
        sequence = completion.stop_reason if isinstance(completion.stop_reason, str) else None
        reason = "end_turn" if sequence is None else "stop_sequence"
        if completion.finish_reason == "length":
            reason = "max_tokens"
        elif parser.num_calls > 0 and parser.num_complete == parser.num_calls:
            reason, sequence = "tool_use", None
        return {"stop_reason": reason, "stop_sequence": sequence}


def _usage(output: RequestOutput) -> dict[str, Any]:
    """Tokens of the prompt are counted once: as cached, or as input."""
    return {
        "input_tokens": len(output.prompt_token_ids) - output.num_cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": output.num_cached_tokens,
        "output_tokens": sum(len(completion.token_ids) for completion in output.outputs),
    }


def _event(fields: dict[str, Any]) -> bytes:
    return b"event: " + fields["type"].encode() + b"\ndata: " + one_line(encode_json(fields)) + b"\n\n"
