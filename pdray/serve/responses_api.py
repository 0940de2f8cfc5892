"""/v1/responses: OpenAI's Responses API, without a memory of its own."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from pdray.models.generation_config import SamplingDefaults
from pdray.outputs import CompletionOutput, RequestOutput
from pdray.router.completion import CompletionDelta
from pdray.router.routed import RoutedRequest
from pdray.router.tokenization import encoder_of
from pdray.serve.endpoints import RenderedChat, form
from pdray.serve.errors import to_api_error
from pdray.serve.generation import Generation, merged
from pdray.serve.parsers.answer import AnswerParser
from pdray.serve.protocol import ChatBody
from pdray.serve.responses import encode_json, one_line
from pdray.serve.responses_body import ResponsesBody
from pdray.serve.responses_output import ResponseOutput
from pdray.thinking import END

REASONS = {"length": "max_output_tokens"}


class Responses(Generation):
    """One response."""

    prompt_field = "input"

    def __init__(
        self,
        body: ResponsesBody,
        chat_body: ChatBody,
        chat: RenderedChat,
        request_id: str,
        model: str,
        defaults: SamplingDefaults,
        tokenizer: PreTrainedTokenizerBase | None,
    ) -> None:
        params = chat_body.sampling_params(
            max_tokens=chat_body.max_completion_tokens, logprobs=None, defaults=defaults.values
        )
        super().__init__(chat_body, [chat.prompt], form(params, chat), request_id, model, defaults.max_tokens)
        self._asked = body
        self._format = chat.format
        self._tokenizer = tokenizer

    def choice(self, index: int, output: RequestOutput, completion: CompletionOutput) -> dict[str, Any]:
        raise AssertionError("a response has no choices")

    def delta_choices(self, index: int, delta: CompletionDelta) -> list[dict[str, Any]]:
        raise AssertionError("a response has no choices")

    def answer(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        [output] = outputs
        [completion] = output.outputs
        parser, items = self._format.parser(), ResponseOutput()
        items.take(parser.feed(completion.text) + parser.finish())
        items.close(is_cut=completion.finish_reason != "stop")
        return self._response(items, output, parser)

    async def stream(self, requests: list[RoutedRequest]) -> AsyncGenerator[bytes, None]:
        """Server-sent events; an error after the start is an event, for the status has been sent."""
        [request] = requests
        parser, items = self._format.parser(), ResponseOutput()
        number = 0

        def event(fields: dict[str, Any]) -> bytes:
            nonlocal number
            fields = {"type": fields["type"], "sequence_number": number, **fields}
            number += 1
            return b"event: " + fields["type"].encode() + b"\ndata: " + one_line(encode_json(fields)) + b"\n\n"

        try:
            for kind in ("response.created", "response.in_progress"):
                yield event({"type": kind, "response": self._response(items, None, parser)})
            async with contextlib.aclosing(merged([request])) as arriving:
                async for _, deltas in arriving:
                    for delta in deltas:
                        for each in items.take(parser.feed(delta.text)):
                            yield event(each)
            is_cut = request.output.outputs[0].finish_reason != "stop"
            for each in items.take(parser.finish()) + items.close(is_cut=is_cut):
                yield event(each)
            response = self._response(items, request.output, parser)
            yield event({"type": f"response.{response['status']}", "response": response})
        except Exception as error:
            problem = to_api_error(error).body["error"]
            response = self._response(items, None, parser) | {"status": "failed"}
            response["error"] = {"code": "server_error", "message": problem["message"]}
            yield event({"type": "response.failed", "response": response})

    def _response(self, items: ResponseOutput, output: RequestOutput | None, parser: AnswerParser) -> dict[str, Any]:
        """Args:
        output: None while it is not at its end.
        """
        asked = self._asked
        status, reason = "in_progress", None
        if output is not None:
            reason = REASONS.get(output.outputs[0].finish_reason or "abort")
            status = "completed" if output.outputs[0].finish_reason == "stop" else "incomplete"
        text = asked.text
        return {
            "id": self.request_id,
            "object": "response",
            "created_at": self.created,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "error": None,
            "incomplete_details": None if reason is None else {"reason": reason},
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "metadata": asked.metadata or {},
            "model": self.model,
            "output": items.items,
            "parallel_tool_calls": asked.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": None if asked.reasoning is None else asked.reasoning.effort, "summary": None},
            "store": False,
            "temperature": self.params.temperature,
            "text": {"format": (text and text.format) or {"type": "text"}},
            "tool_choice": asked.tool_choice or "auto",
            "tools": asked.tools or [],
            "top_p": self.params.top_p,
            "truncation": "disabled",
            "usage": None if output is None else self._usage(items, output),
            "user": asked.user,
        }

    def _usage(self, items: ResponseOutput, output: RequestOutput) -> dict[str, Any]:
        num_input, token_ids = len(output.prompt_token_ids), output.outputs[0].token_ids
        thoughts = "".join(
            part["text"] for item in items.items if item["type"] == "reasoning" for part in item["content"]
        )
        return {
            "input_tokens": num_input,
            # what enters a cache costs nothing, and so is not told
            "input_tokens_details": {"cached_tokens": output.num_cached_tokens, "cache_write_tokens": 0},
            "output_tokens": len(token_ids),
            "output_tokens_details": {"reasoning_tokens": self._num_reasoning_tokens(thoughts, token_ids)},
            "total_tokens": num_input + len(token_ids),
        }

    def _num_reasoning_tokens(self, thoughts: str, token_ids: list[int]) -> int:
        """Those before the tag that ends the thoughts; where it is no token of its own, those of their text."""
        if not thoughts or self._tokenizer is None:
            return 0
        end = self._tokenizer.get_vocab().get(END)
        if end is None:
            return len(encoder_of(self._tokenizer).encode(thoughts, add_special_tokens=False))
        return token_ids.index(end) if end in token_ids else len(token_ids)
