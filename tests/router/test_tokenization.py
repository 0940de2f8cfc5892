"""Work that is bounded before it is done: lengths, slices, threads."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from pdray.errors import InvalidRequestError
from pdray.router.tokenization import (
    LONG_FROM_CHARS,
    MIN_SLICE_CHARS,
    THREAD_FROM_CHARS,
    TextEncoder,
    beside_loop,
)
from pdray.router.validation import check_tokenizer, tokenize, tokenize_all
from pdray.sampling_params import SamplingParams

TOO_LONG = r"^This model's maximum context length is 100 tokens \(max_model_len\), .* the prompt has "


def byte_level(**parts: Any) -> PreTrainedTokenizerFast:
    """Two bytes at most a token, and a start token before every text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {char: number for number, char in enumerate([*alphabet, "aa", "ab", "ĠĠ", "Ãł", "<s>"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("a", "a"), ("a", "b"), ("Ġ", "Ġ"), ("Ã", "ł")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", vocabulary["<s>"])])
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


def sentencepiece() -> PreTrainedTokenizerFast:
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "▁a", "▁▁"]
    merges = [("▁", "a"), ("▁", "▁")]
    model = models.BPE({word: n for n, word in enumerate(words)}, merges, unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


BOUNDED = {
    "byte_level": byte_level(),
    "nfc": byte_level(normalizer=normalizers.NFC()),
    "sentencepiece": sentencepiece(),
}
UNBOUNDED = {
    "strips": byte_level(normalizer=normalizers.Strip()),
    "collapses": byte_level(normalizer=normalizers.Replace(Regex(" {2,}"), " ")),
    "removes": byte_level(pre_tokenizer=pre_tokenizers.Split(" ", "removed")),
    "words": PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))),
    "swallows": byte_level(),
}
UNBOUNDED["swallows"].add_tokens([AddedToken("<end>", rstrip=True, normalized=False)])
MARKS = (
    "\N{KELVIN SIGN}\N{HANGUL CHOSEONG KIYEOK}\N{HANGUL JUNGSEONG A}\N{HANGUL JONGSEONG KIYEOK}e\u0301a\u0308\u0304▁ "
)


class CountingBackend:
    """A backend tokenizer that counts the characters that it is given."""

    def __init__(self, backend: Tokenizer) -> None:
        self._backend = backend
        self.num_chars = 0

    def encode_batch_fast(self, texts: list[str], **options: Any) -> Any:
        self.num_chars += sum(map(len, texts))
        return self._backend.encode_batch_fast(texts, **options)


def counting(tokenizer: PreTrainedTokenizerFast) -> tuple[TextEncoder, CountingBackend]:
    encoder = TextEncoder(tokenizer)
    encoder._backend = backend = CountingBackend(tokenizer.backend_tokenizer)  # type: ignore[assignment]
    return encoder, backend


@pytest.mark.parametrize("name", sorted(BOUNDED | UNBOUNDED))
@given(text=st.text(max_size=30), marks=st.text(MARKS, max_size=30))
def test_ids_are_the_tokenizers_own(name: str, text: str, marks: str) -> None:
    tokenizer = (BOUNDED | UNBOUNDED)[name]
    encoder = TextEncoder(tokenizer)
    for special in (True, False):
        ids = tokenizer.encode(text + marks, add_special_tokens=special)
        assert encoder.encode(text + marks, add_special_tokens=special) == ids


@pytest.mark.parametrize("name", sorted(BOUNDED))
@given(unit=st.text(st.sampled_from("ab é" + MARKS), min_size=1, max_size=4), count=st.integers(1, 50))
def test_no_text_that_fits_is_refused_for_its_length(name: str, unit: str, count: int) -> None:
    tokenizer = BOUNDED[name]
    encoder = TextEncoder(tokenizer)
    assert encoder._token_reach is not None
    text = unit * count
    encoder.check_length(text, max(1, len(tokenizer.encode(text, add_special_tokens=False))))


@pytest.mark.parametrize("name", sorted(BOUNDED))
def test_a_text_that_cannot_fit_is_not_tokenized(name: str) -> None:
    encoder, backend = counting(BOUNDED[name])
    with pytest.raises(InvalidRequestError, match=TOO_LONG + "at least [0-9]+ tokens") as error:
        encoder.encode("x" * 4_000_000, 100)
    assert error.value.param == "prompt" and backend.num_chars == 0


@pytest.mark.parametrize("name", sorted(UNBOUNDED))
def test_where_a_token_has_no_longest_text_nothing_is_refused_for_its_length(name: str) -> None:
    encoder = TextEncoder(UNBOUNDED[name])
    encoder.check_length("x" * 1_000_000, 1)


def test_then_the_beginning_decides() -> None:
    encoder, backend = counting(UNBOUNDED["strips"])
    with pytest.raises(InvalidRequestError, match=TOO_LONG + "more than 100 tokens"):
        encoder.encode("x" * 4_000_000, 100)
    assert backend.num_chars == MIN_SLICE_CHARS


def test_a_long_text_of_few_tokens_is_served() -> None:
    """Slices never cost more than half of the text itself, and refuse nothing that fits."""
    encoder, backend = counting(UNBOUNDED["strips"])
    text = " " * 3_000_000 + "ab"
    assert encoder.encode(text, 100) == UNBOUNDED["strips"].encode("ab")
    assert backend.num_chars <= 1.5 * len(text)


def test_a_text_that_just_does_not_fit() -> None:
    """It leaves no room for output."""
    encoder = TextEncoder(byte_level())
    assert len(encoder.encode("x" * 98, 100)) == 99
    with pytest.raises(InvalidRequestError, match=TOO_LONG + "100 tokens"):
        encoder.encode("x" * 99, 100)


async def test_the_prompts_of_a_call_are_looked_at_before_any_is_tokenized(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_level()
    tokenized: list[str] = []
    monkeypatch.setattr(TextEncoder, "encode", lambda self, text, *rest: tokenized.append(text) or [1])
    for wrong in ("x" * 1000, [1] * 100, [10_000], [-1]):
        with pytest.raises(InvalidRequestError):
            await tokenize_all(tokenizer, ["fits", [1], wrong], 100)  # type: ignore[list-item]
    assert tokenized == []
    assert await tokenize_all(tokenizer, ["fits", [1, 2]], 100) == [[1], [1, 2]] and tokenized == ["fits"]


async def test_too_many_ids_are_counted_and_not_looked_at() -> None:
    ids: list[Any] = [object()] * 1_000_000
    with pytest.raises(InvalidRequestError, match=TOO_LONG + "1000000 tokens"):
        await tokenize(byte_level(), ids, 100)


async def test_long_texts_wait_for_each_other_and_nobody_else_for_them() -> None:
    """Each long one ends only after a text of middle length, asked for later, is done: so it does not block that."""
    running, most, lock = 0, 0, threading.Lock()
    done = threading.Event()

    def long() -> bool:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        in_time = done.wait(60)
        with lock:
            running -= 1
        return in_time

    waiting = [asyncio.ensure_future(beside_loop(LONG_FROM_CHARS + 1, long)) for _ in range(6)]
    await asyncio.sleep(0)
    assert await beside_loop(THREAD_FROM_CHARS + 1, threading.get_ident) != threading.get_ident()
    assert await beside_loop(THREAD_FROM_CHARS, threading.get_ident) == threading.get_ident()
    done.set()
    assert all(await asyncio.gather(*waiting)) and most == 1


async def test_cancelled_work_leaves_its_queue() -> None:
    release, began = threading.Event(), []
    first = asyncio.ensure_future(beside_loop(LONG_FROM_CHARS + 1, lambda: release.wait(60)))
    second = asyncio.ensure_future(beside_loop(LONG_FROM_CHARS + 1, lambda: began.append("second")))
    third = asyncio.ensure_future(beside_loop(LONG_FROM_CHARS + 1, lambda: began.append("third")))
    await asyncio.sleep(0)
    second.cancel()
    await asyncio.gather(second, return_exceptions=True)
    release.set()
    await asyncio.gather(first, third)
    assert began == ["third"]


@pytest.mark.parametrize(
    "params", [{"stop": ("a",)}, {"include_stop_str_in_output": True}, {"skip_special_tokens": False}]
)
def test_what_needs_a_tokenizer_is_refused_by_name(params: dict[str, Any]) -> None:
    [name] = params
    with pytest.raises(InvalidRequestError, match=f"^{name} needs a tokenizer.*skip_tokenizer_init") as error:
        check_tokenizer(SamplingParams(**params), None)
    assert error.value.param == name
    check_tokenizer(SamplingParams(**params), byte_level())
    check_tokenizer(SamplingParams(stop_token_ids=(5,)), None)
