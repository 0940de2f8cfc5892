"""Streamed text against the tokenizer's own decoding, and against a naive search for stop strings."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from pdray.outputs import Logprob
from pdray.router.detokenizer import Detokenizer, decode_logprobs
from pdray.router.text_stream import MAX_OPEN_BYTES, TextStream
from pdray.sampling_params import SamplingParams

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
TEXTS = ["the cat sat on the mat, the hat and the bat", "日本語とラーメン", "naïve café 🎉🎊 façade", "aaaa abab baba"]


def byte_level() -> PreTrainedTokenizerFast:
    """Like Llama 3's and Qwen's: characters outside of the merges are several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def metaspace() -> PreTrainedTokenizerFast:
    """Like Llama 2's: words begin with ▁, a text's first space is not shown, and rare characters are bytes."""
    words = ["▁the", "▁cat", "s", "at", "▁", "a", "b", "."]
    vocabulary = {word: number for number, word in enumerate(["<unk>", *(f"<0x{b:02X}>" for b in range(256)), *words])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")


TOKENIZERS = {"byte_level": byte_level(), "metaspace": metaspace()}


def stream(
    tokenizer: PreTrainedTokenizerFast, prompt: list[int], ids: list[int], **params: object
) -> tuple[list[str], str | None, int]:
    """(shown pieces, stop string, tokens used) until a stop string or the end of ids."""
    detokenizer = Detokenizer(tokenizer, prompt, SamplingParams(max_tokens=None, **params))  # type: ignore[arg-type]
    pieces = []
    for count, token_id in enumerate(ids, 1):
        piece = detokenizer.feed(token_id)
        pieces.append(piece.text)
        if piece.stop is not None:
            assert len("".join(pieces)) == detokenizer.num_chars == detokenizer.num_shown
            return pieces, piece.stop, count
    return [*pieces, detokenizer.flush()], None, len(ids)


def whole_text(tokenizer: PreTrainedTokenizerFast, prompt: list[int], ids: list[int]) -> str:
    """The output's text: what follows the prompt's in the decoding of both, without an unfinished last character."""
    decode = tokenizer.backend_tokenizer.decode
    before, both = decode(prompt), decode(prompt + ids)
    assert both.startswith(before)
    return both[len(before) :].rstrip("\N{REPLACEMENT CHARACTER}")


texts = st.text(st.sampled_from("ab. 日é🎉thecs"), max_size=30)


@given(name=st.sampled_from(sorted(TOKENIZERS)), prompt=texts, text=texts)
def test_streamed_text_is_the_whole_text(name: str, prompt: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    prompt_ids, ids = tokenizer.encode(prompt + "a"), tokenizer.encode(text)
    pieces, stop, _ = stream(tokenizer, prompt_ids, ids)
    assert stop is None
    assert "".join(pieces) == whole_text(tokenizer, prompt_ids, ids)


@given(prompt=texts, seed=st.integers(0, 10_000), cut=st.integers(0, 8))
def test_a_prompt_that_ends_within_a_character_is_not_repeated(prompt: str, seed: int, cut: int) -> None:
    """Prompts of token ids may end anywhere; the output begins with the character that its first tokens complete."""
    tokenizer = TOKENIZERS["byte_level"]
    ids = tokenizer.encode(prompt + "🎉本🎊語")
    at = max(1, len(ids) - cut)
    pieces, _, _ = stream(tokenizer, ids[:at], ids[at:])
    before = tokenizer.backend_tokenizer.decode(ids[:at]).rstrip("\N{REPLACEMENT CHARACTER}")
    assert before + "".join(pieces) == tokenizer.backend_tokenizer.decode(ids)


any_ids = st.lists(st.integers(0, 400), max_size=30)  # beyond the vocabulary too, as a padded model draws them


def ends_whole(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> list[int]:
    """With a letter at the end, so that no character is left open."""
    return [*ids, tokenizer.convert_tokens_to_ids("a")]


@given(prompt=any_ids, ids=any_ids, skip=st.booleans())
def test_any_tokens_of_a_byte_level_vocabulary(prompt: list[int], ids: list[int], skip: bool) -> None:
    """Nothing is lost or repeated, however broken: deltas are what the decoding of all has more than the prompt's."""
    tokenizer = TOKENIZERS["byte_level"]
    prompt, ids = ends_whole(tokenizer, prompt), ends_whole(tokenizer, ids)
    before = tokenizer.backend_tokenizer.decode(prompt, skip_special_tokens=skip)
    both = tokenizer.backend_tokenizer.decode(prompt + ids, skip_special_tokens=skip)
    pieces, _, _ = stream(tokenizer, prompt, ids, skip_special_tokens=skip)
    assert before + "".join(pieces) == both


def sentencepiece_text(tokenizer: PreTrainedTokenizerFast, ids: list[int], skip: bool) -> str:
    """A naive decoding by sentencepiece's rule: of bytes that are no character, each is U+FFFD."""
    text, run = "", b""
    tokens = [token for i in ids if (token := tokenizer.backend_tokenizer.id_to_token(i)) is not None]
    for token in [*tokens, ""]:
        if skip and token in ("<unk>", "</s>"):
            continue
        if token.startswith("<0x"):
            run += bytes([int(token[3:5], 16)])
            continue
        while run:
            for length in range(1, 5):
                try:
                    text, run = text + run[:length].decode(), run[length:]
                    break
                except UnicodeDecodeError:
                    pass
            else:
                text, run = text + REPLACEMENT, run[1:]
        text += token.replace("▁", " ")
    return text.removeprefix(" ")


@given(prompt=any_ids, ids=any_ids, skip=st.booleans())
def test_any_tokens_of_a_byte_fallback_vocabulary(prompt: list[int], ids: list[int], skip: bool) -> None:
    """As the tokenizer's own decoding, but that good characters beside broken bytes stay: they have been shown."""
    tokenizer = TOKENIZERS["metaspace"]
    prompt, ids = ends_whole(tokenizer, prompt), ends_whole(tokenizer, ids)
    pieces, _, _ = stream(tokenizer, prompt, ids, skip_special_tokens=skip)
    expected = sentencepiece_text(tokenizer, prompt + ids, skip)
    assert sentencepiece_text(tokenizer, prompt, skip) + "".join(pieces) == expected
    own = tokenizer.backend_tokenizer.decode(prompt + ids, skip_special_tokens=skip)
    assert own == expected or (len(own) >= len(expected) and REPLACEMENT in expected)


@given(name=st.sampled_from(sorted(TOKENIZERS)), special=st.integers(0, 2), ids=any_ids)
def test_a_text_begins_where_the_prompt_has_none(name: str, special: int, ids: list[int]) -> None:
    """A prompt of special tokens alone is no text, so the output's first space is not shown where decoders drop it."""
    tokenizer = TOKENIZERS[name]
    words = ["▁the", "▁", "a"] if name == "metaspace" else ["Ġ", "t", "a"]
    ids = [tokenizer.convert_tokens_to_ids(words[i % 3]) for i in ids]
    pieces, _, _ = stream(tokenizer, [tokenizer.eos_token_id] * special, ids)
    assert "".join(pieces) == tokenizer.backend_tokenizer.decode(ids)


@pytest.mark.parametrize("prompt", ["a\ufffd", "\ufffd", "\ufffd\ufffd\ufffd", "日\ufffd"])
@pytest.mark.parametrize("name", sorted(TOKENIZERS))
def test_a_prompt_that_ends_in_a_replacement_character_stays_in_the_prompt(name: str, prompt: str) -> None:
    tokenizer = TOKENIZERS[name]
    pieces, _, _ = stream(tokenizer, tokenizer.encode(prompt), ends_whole(tokenizer, []))
    assert pieces == ["a", ""]


@pytest.mark.parametrize("text", ["a\ufffd", "\ufffd", "日\ufffd\ufffd"])
@pytest.mark.parametrize("name", sorted(TOKENIZERS))
def test_a_replacement_character_that_the_model_wrote_is_text(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    pieces, _, _ = stream(tokenizer, ends_whole(tokenizer, []), tokenizer.encode(text, add_special_tokens=False))
    assert "".join(pieces) == text


@pytest.mark.parametrize("name", sorted(TOKENIZERS))
def test_an_unfinished_character_is_no_text(name: str) -> None:
    """Neither at the end of the output, nor what is left of one that the prompt began and the output did not end."""
    tokenizer = TOKENIZERS[name]
    start, ids = ends_whole(tokenizer, []), tokenizer.encode("a🎊", add_special_tokens=False)
    assert len(ids) > 2
    for cut in range(1, len(ids)):
        assert "".join(stream(tokenizer, start, ids[:-cut])[0]) == "a"
        assert "".join(stream(tokenizer, ids[:-cut], start)[0]) == "a"
    assert "".join(stream(tokenizer, start, ids)[0]) == "a🎊"


@pytest.mark.parametrize("name", sorted(TOKENIZERS))
def test_endless_broken_text_is_never_decoded_twice(name: str) -> None:
    """A lead byte is decided by the byte after it: no more than a character is ever kept, and it is shown at once."""
    tokenizer = TOKENIZERS[name]
    [lead] = {tokenizer.convert_tokens_to_ids(token) for token in ("<0xE6>", "æ")} - {tokenizer.unk_token_id, None}
    text = TextStream(tokenizer, ends_whole(tokenizer, []), skip_special_tokens=True)
    shown = [text.feed(lead) for _ in range(4_000)]
    assert shown == ["", *[REPLACEMENT] * 3_999]
    assert len(text._decoder.getstate()[0]) <= MAX_OPEN_BYTES


def test_any_tokens_are_taken() -> None:
    """Random bytes, mostly broken UTF-8, and ids beyond the vocabulary, as a padded model samples them."""
    rng = random.Random(0)
    for tokenizer in TOKENIZERS.values():
        for _ in range(300):
            ids = [rng.randrange(len(tokenizer) + 20) for _ in range(20)]
            assert isinstance("".join(stream(tokenizer, ids[:5], ids[5:])[0]), str)


@given(
    name=st.sampled_from(sorted(TOKENIZERS)),
    text=texts,
    stops=st.lists(st.text(st.sampled_from("ab. 日🎉th"), min_size=1, max_size=4), min_size=1, max_size=3),
    include=st.booleans(),
    min_tokens=st.sampled_from([0, 0, 3, 7]),
)
def test_stop_strings(name: str, text: str, stops: list[str], include: bool, min_tokens: int) -> None:
    """Text ends at the first stop string, and never shows more on the way there."""
    tokenizer = TOKENIZERS[name]
    prompt, ids = tokenizer.encode("a"), tokenizer.encode(text)
    pieces, stop, used = stream(
        tokenizer, prompt, ids, stop=tuple(stops), include_stop_str_in_output=include, min_tokens=min_tokens
    )
    expected, expected_stop, expected_used = whole_text(tokenizer, prompt, ids), None, len(ids)
    texts_so_far = [""]  # a token that ends within a character shows the whole ones before it; what was shown stays
    for count in range(1, len(ids) + 1):
        texts_so_far.append(max(texts_so_far[-1], whole_text(tokenizer, prompt, ids[:count]), key=len))
    for count in range(min_tokens + 1, len(ids) + 1):
        before, now = texts_so_far[count - 1 : count + 1]
        found = [
            (at, each)
            for each in stops
            for at in range(max(0, len(before) - len(each) + 1), len(now))
            if now.startswith(each, at)
        ]
        if found:
            at, expected_stop = min(found)
            expected, expected_used = now[: at + len(expected_stop) * include], count
            break
    assert ("".join(pieces), stop, used) == (expected, expected_stop, expected_used)
    for count in range(1, len(pieces) + 1):
        assert expected.startswith("".join(pieces[:count]))


def test_special_tokens() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    ids = [*tokenizer.encode("the"), tokenizer.eos_token_id, *tokenizer.encode("cat")]
    assert "".join(stream(tokenizer, ids[:1], ids[1:])[0]).endswith("cat")
    assert "<eos>" not in "".join(stream(tokenizer, ids[:1], ids)[0])
    assert "<eos>" in "".join(stream(tokenizer, ids[:1], ids, skip_special_tokens=False)[0])


def test_without_a_tokenizer_there_is_no_text() -> None:
    detokenizer = Detokenizer(None, [1, 2], SamplingParams(stop=("a",)))
    assert detokenizer.feed(3) == ("", None) and detokenizer.flush() == ""
    logprobs = {3: Logprob(-1.0, 1)}
    assert decode_logprobs(None, logprobs) == logprobs


@pytest.mark.parametrize("name", sorted(TOKENIZERS))
def test_logprobs_are_decoded(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    token_id = tokenizer.encode("b")[0]
    decoded = decode_logprobs(tokenizer, {token_id: Logprob(-0.5, 2)})
    assert decoded == {token_id: Logprob(-0.5, 2, "b", b"b")}
