"""Events that every reader takes for one line, whatever its rules for line ends."""

from __future__ import annotations

import json
from typing import Any

import httpx
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pdray.serve.responses import sse

LINE_ENDS = "\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"  # of str.splitlines


@given(text=st.text(st.one_of(st.sampled_from(LINE_ENDS), st.characters(codec="utf-8"))))
def test_an_event_is_one_line_and_means_the_same(text: str) -> None:
    event = sse({"text": text, text: [text]})
    assert event.endswith(b"\n\n")
    [line, empty] = event.decode().splitlines()
    assert empty == "" and line.startswith("data: ")
    assert json.loads(line[6:]) == msgspec.json.decode(line[6:]) == {"text": text, text: [text]}


def line_end_tokenizer() -> PreTrainedTokenizerFast:
    """Ids 0 to 9 are the line ends, other ids up to 127 their ASCII codes."""
    names = [*LINE_ENDS, *(f"<{code}>" if chr(code) in LINE_ENDS else chr(code) for code in range(10, 128)), "<eos>"]
    tokenizer = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", chat_template="{{ messages[0].content }}"
    )


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_a_stream_read_by_lines(http: httpx.AsyncClient, router: Any, path: str) -> None:
    router.tokenizer = line_end_tokenizer()
    router.reply = "a" + "".join(map(chr, range(10))) + "b"
    body = {"prompt": "x"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "x"}]}
    body |= {"stream": True, "max_tokens": 12, "logprobs": 1 if "prompt" in body else True}
    response = await http.post(path, json=body)
    lines = [line for line in response.content.decode().splitlines() if line]
    assert lines[-1] == "data: [DONE]"
    choices = [json.loads(line.removeprefix("data: "))["choices"][0] for line in lines[:-1]]
    texts = [choice.get("text") or choice.get("delta", {}).get("content") or "" for choice in choices]
    assert "".join(texts) == f"a{LINE_ENDS}b"
