"""Pieces of a vocabulary: token strings and bytes that are the text's, and tell tokens apart."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pdray.errors import ConfigError
from pdray.models.vocabulary import Vocabulary, vocabulary_of
from pdray.outputs import Logprob
from pdray.router.detokenizer import decode_logprobs
from pdray.serve.responses import chat_logprobs, completion_logprobs

LLAMA_2 = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
FROM_GGUF = [decoders.ByteFallback(), decoders.Fuse(), decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)]


def byte_level(*added: AddedToken) -> PreTrainedTokenizerFast:
    """A byte a token, and the added ones from 256 on."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: number for number, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(list(added))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def sentencepiece(decoder: Any = None) -> PreTrainedTokenizerFast:
    """Llama 2's kind; <s> is special."""
    words = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁true", "true", "▁or", "▁", "or", "not", "é"]
    model = models.BPE({word: number for number, word in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoder or decoders.Sequence(LLAMA_2)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>")


def names(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> list[str]:
    decoded = [decode_logprobs(tokenizer, {token_id: Logprob(-1.0, 1)})[token_id].decoded_token for token_id in ids]
    return [name for name in decoded if name is not None]


@pytest.mark.parametrize("steps", [LLAMA_2, FROM_GGUF])
def test_sentencepiece_pieces(steps: list[Any]) -> None:
    tokenizer = sentencepiece(decoders.Sequence(steps))
    ids = tokenizer.convert_tokens_to_ids(["▁true", "or", "▁", "not", "<0x41>", "<0xC3>", "<0xA9>", "é", "<s>"])
    assert names(tokenizer, ids) == [" true", "or", " ", "not", "A", r"bytes:\xc3", r"bytes:\xa9", "é", "<s>"]
    vocabulary = vocabulary_of(tokenizer)
    assert b"".join(map(vocabulary.piece, ids)) == " trueor notAéé<s>".encode()
    assert names(tokenizer, [10_000]) == [""] and vocabulary.piece(10_000) == b""


def test_byte_level_pieces() -> None:
    """Added tokens are what they say, also where the decoder would read their letters as bytes."""
    tokenizer = byte_level(AddedToken("<café>", normalized=False), AddedToken("<｜é▁｜>", special=True))
    ids = [*tokenizer.encode(" a\\é🎉"), 256, 257]
    assert names(tokenizer, ids) == [
        *(" ", "a", "\\", r"bytes:\xc3", r"bytes:\xa9"),
        *(rf"bytes:\x{byte:02x}" for byte in "🎉".encode()),
        *("<café>", "<｜é▁｜>"),
    ]
    assert b"".join(map(vocabulary_of(tokenizer).piece, ids)) == " a\\é🎉<café><｜é▁｜>".encode()


@given(text=st.text(max_size=20))
@pytest.mark.parametrize("tokenizer", [byte_level(), sentencepiece()], ids=["byte_level", "sentencepiece"])
def test_pieces_are_the_text(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    """Joined, but for the space that sentencepiece puts in front."""
    pieces = b"".join(map(vocabulary_of(tokenizer).piece, tokenizer.encode(text, add_special_tokens=False)))
    assert pieces.decode().removeprefix(" " if tokenizer.bos_token else "") == text.replace(
        "▁", " " if tokenizer.bos_token else "▁"
    )


def test_a_piece_that_shows_bytes_is_told_from_its_parts() -> None:
    """Letters beside a part of a character are shown; what could be taken for an escape is escaped."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, "Ġ\\aÃ"]
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, []))
    tokenizer.decoder = decoders.ByteLevel()
    assert names(PreTrainedTokenizerFast(tokenizer_object=tokenizer), [256]) == [r"bytes: \x5ca\xc3"]


@pytest.mark.parametrize(
    "decoder",
    [
        decoders.CTC(),
        decoders.BPEDecoder(),
        decoders.WordPiece(),
        decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 0, 1)]),
        decoders.Sequence([decoders.Fuse(), decoders.Replace("ab", "c")]),
    ],
)
def test_a_decoder_that_looks_beyond_a_token_is_refused(decoder: Any) -> None:
    kind = {"Sequence": "Strip|Replace", "BPEDecoder": "BPEDecoder"}.get(type(decoder).__name__, type(decoder).__name__)
    with pytest.raises(ConfigError, match=f'"type": "({kind})".*set tokenizer'):
        Vocabulary(sentencepiece(decoder))


def test_no_decoder_separates_tokens() -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    vocabulary = Vocabulary(PreTrainedTokenizerFast(tokenizer_object=tokenizer))
    assert vocabulary.first_piece(0) + vocabulary.piece(1) == tokenizer.decode([0, 1]).encode()


# the API's shapes


def steps_of(tokenizer: PreTrainedTokenizerFast, *steps: dict[str, tuple[float, int]]) -> list[dict[int, Logprob]]:
    """Each step: token to its log-probability and rank."""
    found = []
    for step in steps:
        ids = {tokenizer.convert_tokens_to_ids(token): Logprob(*values) for token, values in step.items()}
        found.append(decode_logprobs(tokenizer, ids))
    return found


@pytest.mark.parametrize("num_top", [1, 2])
def test_top_logprobs_do_not_collide(num_top: int) -> None:
    """What looks the same to decode([id]) differs, and asking for more changes no entry."""
    tokenizer = sentencepiece()
    steps = steps_of(tokenizer, {"▁true": (-0.127, 1), "true": (-2.127, 2)})
    ids = [tokenizer.convert_tokens_to_ids("▁true")]
    answer = completion_logprobs(ids, steps, num_top, [0])
    assert answer is not None and answer["tokens"] == [" true"] and answer["token_logprobs"] == [-0.127]
    assert answer["top_logprobs"] == [dict([(" true", -0.127), ("true", -2.127)][:num_top])]
    chat = chat_logprobs(ids, steps, num_top)
    assert chat is not None
    [entry] = chat["content"]
    assert [(top["token"], top["logprob"]) for top in entry["top_logprobs"]] == [(" true", -0.127), ("true", -2.127)][
        :num_top
    ]


@pytest.mark.parametrize(("sampled", "other"), [("<0x41>", "A"), ("A", "<0x41>")])
def test_different_tokens_that_are_the_same_text(sampled: str, other: str) -> None:
    """The sampled one has the name, whatever its rank; no value overwrites another."""
    words = {"<unk>": 0, "A": 1, **{f"<0x{byte:02X}>": 2 + byte for byte in range(256)}}
    tokenizer = Tokenizer(models.BPE(words, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(LLAMA_2)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    steps = steps_of(wrapped, {other: (-0.5, 1), sampled: (-1.5, 2)})
    answer = completion_logprobs([words[sampled]], steps, 2, [0])
    assert answer is not None and answer["tokens"] == ["A"]
    assert answer["top_logprobs"] == [{"A": -1.5, f"token_id:{words[other]}": -0.5}]


def test_bytes_in_chat() -> None:
    tokenizer = byte_level()
    ids = tokenizer.encode("é")
    steps = [decode_logprobs(tokenizer, {token_id: Logprob(-1.0, 1)}) for token_id in ids]
    chat = chat_logprobs(ids, steps, 1)
    assert chat is not None
    assert [entry["bytes"] for entry in chat["content"]] == [[0xC3], [0xA9]]
    assert [entry["top_logprobs"][0]["token"] for entry in chat["content"]] == [r"bytes:\xc3", r"bytes:\xa9"]


def test_without_a_tokenizer_tokens_are_called_by_their_ids() -> None:
    steps = [{7: Logprob(-0.5, 1), 8: Logprob(-1.5, 2)}]
    answer = completion_logprobs([7], steps, 2, [0])
    assert answer is not None and answer["tokens"] == ["token_id:7"]
    assert answer["top_logprobs"] == [{"token_id:7": -0.5, "token_id:8": -1.5}]
