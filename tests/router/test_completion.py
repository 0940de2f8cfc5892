"""A completion as it grows: what is shown, with which tokens, and where they stand in the text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pdray.outputs import Logprob, SampledToken
from pdray.router.completion import CompletionDelta, GrowingCompletion
from pdray.sampling_params import SamplingParams


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A byte a token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: number for number, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


TOKENIZER = byte_tokenizer()
PROMPT = TOKENIZER.encode("x")


def sampled(text: str, *, finish: str | None = "length") -> list[SampledToken]:
    """The text's tokens, each with its log-probability."""
    ids = TOKENIZER.encode(text)
    reasons = [None] * (len(ids) - 1) + [finish]
    return [
        SampledToken(0, position, token_id, {token_id: Logprob(-1.0, 1)}, reason)
        for position, (token_id, reason) in enumerate(zip(ids, reasons, strict=True))
    ]


def run(
    text: str, *, stream_from: int | None = 0, take_every: int = 1, **params: object
) -> tuple[GrowingCompletion, list[CompletionDelta]]:
    """Tokens until a stop string or the end; deltas are taken after every so many tokens, and at the end."""
    completion = GrowingCompletion(0, TOKENIZER, PROMPT, SamplingParams(max_tokens=None, logprobs=0, **params))  # type: ignore[arg-type]
    deltas = []
    for number, token in enumerate(sampled(text)):
        if number == stream_from:
            completion.stream()
        completion.take(token)
        if number % take_every == 0:
            deltas.append(completion.take_delta())
        if completion.output.finished:
            break
    if stream_from is not None and number < stream_from:
        completion.stream()
    deltas.append(completion.take_delta())
    return completion, [delta for delta in deltas if delta is not None]


texts = st.text(st.sampled_from("abc é日🎉"), min_size=1, max_size=12)


@given(text=texts, stops=st.lists(st.text("abcé日", min_size=1, max_size=3), max_size=2), every=st.integers(1, 5))
def test_deltas_are_the_output(text: str, stops: list[str], every: int) -> None:
    """However they are merged, and from wherever the stream begins: text, ids, logprobs and offsets."""
    whole, none = run(text, stream_from=None, stop=tuple(stops))
    assert none == []
    for start in (0, 2):
        streamed, deltas = run(text, stream_from=start, take_every=every, stop=tuple(stops))
        assert "".join(delta.text for delta in deltas) == streamed.output.text == whole.output.text
        assert [i for delta in deltas for i in delta.token_ids] == streamed.output.token_ids == whole.output.token_ids
        assert [step for delta in deltas for step in delta.logprobs or []] == whole.output.logprobs
        assert [at for delta in deltas for at in delta.text_offsets or []] == whole.output.text_offsets
        assert deltas[-1].finish_reason == whole.output.finish_reason == streamed.output.finish_reason
        assert streamed.output.logprobs is None and streamed.output.text_offsets is None


@given(text=texts)
def test_offsets_are_those_of_the_characters(text: str) -> None:
    completion, _ = run(text, stream_from=None)
    assert completion.output.text == text
    assert completion.output.text_offsets == [at for at, char in enumerate(text) for _ in char.encode()]
    assert (
        b"".join(
            step[i].token_bytes or b""
            for i, step in zip(completion.output.token_ids, completion.output.logprobs or [], strict=True)
        )
        == text.encode()
    )


def test_logprobs_come_with_their_text_and_end_with_the_stop_string() -> None:
    """Those of text that is held back wait for it; those of text that is cut stand at the end of the text."""
    completion, deltas = run("abcdef", stop=("cde",))
    shown = [
        (delta.text, "".join(chr(b) for s in delta.logprobs or [] for b in s.popitem()[1].token_bytes or b""))
        for delta in deltas
    ]
    assert shown == [("", ""), ("", ""), ("a", "a"), ("b", "b"), ("", "cde")]
    assert [delta.text_offsets for delta in deltas if delta.text_offsets] == [[0], [1], [2, 2, 2]]
    assert completion.output.text == "ab" and completion.output.stop_reason == "cde"


def test_a_special_token_takes_no_room() -> None:
    completion = GrowingCompletion(0, TOKENIZER, PROMPT, SamplingParams(max_tokens=None, logprobs=0))
    eos = TOKENIZER.eos_token_id
    first, second = sampled("a", finish=None), sampled("b", finish=None)
    for token in [*first, SampledToken(0, 1, eos, {eos: Logprob(-1.0, 1)}), *second]:
        completion.take(token)
    completion.close()
    assert completion.output.text == "ab" and completion.output.text_offsets == [0, 1, 1]
    assert [step.popitem()[1].decoded_token for step in completion.output.logprobs or []] == ["a", "<eos>", "b"]


@pytest.mark.parametrize("streamed", [False, True])
def test_a_text_is_joined_once(streamed: bool) -> None:
    """Not at every token, which would copy it each time; deltas that nobody takes are merged as late."""
    completion = GrowingCompletion(0, TOKENIZER, PROMPT, SamplingParams(max_tokens=None))
    if streamed:
        completion.stream()
    for token in sampled("a" * 1000, finish=None):
        completion.take(token)
        assert completion.output.text == "" and (completion._delta is None or completion._delta.text == "")
    completion.close()
    assert completion.output.text == "a" * 1000
    delta = completion.take_delta()
    assert (None if delta is None else delta.text) == ("a" * 1000 if streamed else None)


@pytest.mark.parametrize("is_text,expected", [(True, "ab"), (False, "a")])
def test_the_last_token_of_a_grammar_is_text(is_text: bool, expected: str) -> None:
    """Unlike an end-of-sequence token: nothing may follow it, and it was written."""
    completion = GrowingCompletion(0, TOKENIZER, PROMPT, SamplingParams())
    first, last = TOKENIZER.encode("ab")
    completion.take(SampledToken(0, 0, first))
    completion.take(SampledToken(0, 1, last, None, "stop", None, is_text))
    assert (completion.output.text, completion.output.finish_reason) == (expected, "stop")
