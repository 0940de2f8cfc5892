"""Tokenizers of GGUF files with tiny vocabularies: what the file says of them is what is done."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import pre_tokenizers

from pdray.config import Config
from pdray.errors import ModelLoadError
from pdray.models import load_tokenizer
from pdray.models.splits import SPLITS

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ hello", "1 2", "12 3", "ã ģ", "Ċ Ċ", "Ġ Ġ", "' s"]
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TOKENS = [*BYTES, *(merge.replace(" ", "") for merge in MERGES), *CONTROL, "<think>"]
KINDS = [1] * (len(TOKENS) - 4) + [3] * 3 + [4]
BOS, EOS = TOKENS.index("<|endoftext|>"), TOKENS.index("<|im_end|>")
TEXT = "hello  hello's 12345\n\n x=1231 <|im_start|>あé<think>!!\r\n  end"

# Pieces of a sentencepiece vocabulary: the three specials, bytes, characters, and words of several of them.
PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *"helowrd!", "he", "ll", "hell", "hello"]
PIECES += ["▁hello", "▁w", "or", "▁wor", "ld", "<tool>"]
PIECE_KINDS = [2, 3, 3, *[6] * 256, *[1] * (len(PIECES) - 260), 4]
PIECE_SCORES = [0.0] * 259 + [-float(i) for i in range(len(PIECES) - 259)]

Convert = Callable[..., Any]


def write(file: Path, fields: dict[str, Any]) -> None:
    """A file without tensors; each field is of the type that llama.cpp writes."""
    writer = gguf.GGUFWriter(file, fields.pop("architecture", "llama"))
    for key, value in fields.items():
        key = key if key.startswith("tokenizer.") else f"tokenizer.ggml.{key}"
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def convert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Convert:
    """Load the tokenizer of a file that has these fields; None takes one out of the vocabulary's own."""
    monkeypatch.setenv("PDRAY_CACHE", str(tmp_path / "cache"))

    def load(base: dict[str, Any], **changes: Any) -> Any:
        fields = {key: value for key, value in {**base, **changes}.items() if value is not None}
        write(tmp_path / "model.gguf", fields)
        return load_tokenizer(Config(model=str(tmp_path / "model.gguf")))

    return load


BYTE_LEVEL: dict[str, Any] = {
    "model": "gpt2",
    "pre": "gpt-2",
    "tokens": TOKENS,
    "token_type": KINDS,
    "merges": MERGES,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "tokenizer.chat_template": "{{ messages }}",
}
SENTENCEPIECE: dict[str, Any] = {
    "model": "llama",
    "pre": "default",
    "tokens": PIECES,
    "token_type": PIECE_KINDS,
    "scores": PIECE_SCORES,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "unknown_token_id": 0,
}


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize("pre", ["qwen2", "llama-bpe", "gpt-2", "smollm", "tekken", "default"])
def test_round_trip_and_special_tokens(architecture: str, pre: str, convert: Convert) -> None:
    tokenizer = convert(BYTE_LEVEL, architecture=architecture, pre=pre)
    token_ids = tokenizer(TEXT).input_ids
    starts_with_bos = pre in ("llama-bpe", "tekken")
    assert (token_ids[0] == BOS) == starts_with_bos
    text = unicodedata.normalize("NFC", TEXT) if pre == "qwen2" else TEXT
    assert tokenizer.decode(token_ids[starts_with_bos:]) == text
    assert TOKENS.index("<think>") in token_ids and TOKENS.index("<|im_start|>") in token_ids
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|endoftext|>", "<|im_end|>")
    assert tokenizer.chat_template == "{{ messages }}"
    digits = ["1", "2", "3"] if pre in ("qwen2", "smollm", "tekken") else ["123"]
    assert tokenizer.tokenize("123") == digits


@pytest.mark.parametrize("pre", SPLITS)
def test_what_is_added_around_a_text(pre: str, convert: Convert) -> None:
    plain = convert(BYTE_LEVEL, pre=pre, add_bos_token=False)("hello").input_ids
    assert BOS not in plain
    assert convert(BYTE_LEVEL, pre=pre, add_bos_token=True)("hello").input_ids == [BOS, *plain]
    assert convert(BYTE_LEVEL, pre=pre)("hello").input_ids == [BOS] * SPLITS[pre].add_bos + plain
    both = convert(BYTE_LEVEL, pre=pre, add_bos_token=True, add_eos_token=True)
    assert both("hello").input_ids == [BOS, *plain, EOS]
    assert both("hello", add_special_tokens=False).input_ids == plain


def test_a_sentencepiece_vocabulary_adds_what_the_file_says(convert: Convert) -> None:
    text = convert(SENTENCEPIECE, add_bos_token=False)("hello world").input_ids
    assert [PIECES[i] for i in text] == ["▁hello", "▁wor", "ld"]
    assert convert(SENTENCEPIECE)("hello world").input_ids == [1, *text]
    assert convert(SENTENCEPIECE, add_bos_token=True)("hello world").input_ids == [1, *text]
    around = convert(SENTENCEPIECE, add_eos_token=True)
    assert around("hello world").input_ids == [1, *text, 2]
    assert around.decode(around("hello world").input_ids, skip_special_tokens=True) == "hello world"


def test_the_ids_that_llama_cpp_assumes_of_a_sentencepiece_vocabulary(convert: Convert) -> None:
    tokenizer = convert(SENTENCEPIECE, bos_token_id=None, eos_token_id=None, unknown_token_id=None)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == ("<s>", "</s>", "<unk>")
    assert tokenizer("hello").input_ids[0] == 1


def test_add_space_prefix(convert: Convert) -> None:
    with_prefix, without = convert(SENTENCEPIECE), convert(SENTENCEPIECE, add_space_prefix=False)
    assert with_prefix.tokenize("hello") == ["▁hello"] and without.tokenize("hello") == ["hello"]
    for text in ("hello", " hello", "  hello  world"):
        assert without.decode(without(text).input_ids[1:]) == text
        assert with_prefix.decode(with_prefix(text).input_ids[1:]) == text
    # as llama.cpp does, a text after a special token begins anew
    assert with_prefix.tokenize("<tool>hello") == ["<tool>", "▁hello"]


def test_remove_extra_whitespaces(convert: Convert) -> None:
    tokenizer = convert(SENTENCEPIECE, remove_extra_whitespaces=True)
    assert tokenizer.tokenize("  hello   hello ") == ["▁hello", "▁hello"]
    assert convert(SENTENCEPIECE).tokenize("  hello") == ["▁", "▁", "▁hello"]


@pytest.mark.parametrize("base", [BYTE_LEVEL, SENTENCEPIECE], ids=["byte-level", "sentencepiece"])
def test_unknown_and_padding_ids(base: dict[str, Any], convert: Convert) -> None:
    tokenizer = convert(base, unknown_token_id=0, padding_token_id=2)
    assert tokenizer.unk_token_id == 0 and tokenizer.pad_token_id == 2
    assert convert(base).pad_token_id is None
    assert convert(base, unknown_token_id=None).unk_token_id == (0 if base is SENTENCEPIECE else None)


def test_characters_that_no_piece_has(convert: Convert) -> None:
    assert convert(SENTENCEPIECE).tokenize("hé") == ["▁", "h", "<0xC3>", "<0xA9>"]
    no_bytes = [(piece, kind) for piece, kind in zip(PIECES, PIECE_KINDS, strict=True) if kind != 6]
    pieces, kinds = [piece for piece, _ in no_bytes], [kind for _, kind in no_bytes]
    tokenizer = convert(SENTENCEPIECE, tokens=pieces, token_type=kinds, scores=PIECE_SCORES[256:])
    assert tokenizer.tokenize("hé") == ["▁", "h", "<unk>"]


def test_only_the_chat_template_for_chat_is_used(convert: Convert) -> None:
    others = {"tokenizer.chat_templates": ["tool_use"], "tokenizer.chat_template.tool_use": "{{ tools }}"}
    assert convert(BYTE_LEVEL, **others, **{"tokenizer.huggingface.json": "{}"}).chat_template == "{{ messages }}"


def test_kinds_of_tokens(convert: Convert) -> None:
    tokenizer = convert(BYTE_LEVEL)
    ids = tokenizer("<|im_start|>hello<think>", add_special_tokens=False).input_ids
    assert [TOKENS[i] for i in ids] == ["<|im_start|>", "hello", "<think>"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "hello<think>"  # user-defined tokens are text
    normal = convert(BYTE_LEVEL, token_type=[1] * len(TOKENS))
    assert TOKENS.index("<think>") not in normal("<think>").input_ids
    added = convert(BYTE_LEVEL, token_type=[1] * len(TOKENS), added_tokens=["<think>"])
    assert added("<think>").input_ids == [TOKENS.index("<think>")]


def test_scores_decide_and_merges_where_they_do_not(convert: Convert) -> None:
    first_or = [-100.0 if piece == "▁w" else score for piece, score in zip(PIECES, PIECE_SCORES, strict=True)]
    assert convert(SENTENCEPIECE).tokenize("world") == ["▁wor", "ld"]
    split = convert(SENTENCEPIECE, scores=first_or, tokens=[p if p != "▁wor" else "x" for p in PIECES])
    assert split.tokenize("world") == ["▁w", "or", "ld"]
    by_merges = convert(SENTENCEPIECE, scores=[-1000.0] * len(PIECES), merges=["l l", "h e"])
    assert by_merges.tokenize("hello") == ["▁", "he", "ll", "o"]
    with pytest.raises(ModelLoadError, match="no tokenizer.ggml.scores that differ, and no merges"):
        convert(SENTENCEPIECE, scores=None)


@pytest.mark.parametrize("beside", ["tokenizer.model", "tokenizer.json", "tokenizer_config.json", "vocab.json"])
def test_the_files_own_vocabulary_is_read_whatever_lies_beside_it(
    beside: str, convert: Convert, tmp_path: Path
) -> None:
    (tmp_path / beside).write_text('{"bos_token": "<wrong>"}' if beside.endswith("json") else "bm90aGluZw== 0\n")
    assert convert(BYTE_LEVEL).tokenize("hello") == ["hello"]
    assert convert(SENTENCEPIECE)("hello").input_ids == [1, PIECES.index("▁hello")]
    tokenizer = load_tokenizer(Config(model=str(tmp_path)))
    assert tokenizer is not None and tokenizer.bos_token == "<s>"


@pytest.mark.parametrize(
    ("base", "changes", "named"),
    [
        (BYTE_LEVEL, {"model": "bert"}, "tokenizer.ggml.model in .* is 'bert'; pdray knows llama and gpt2"),
        (BYTE_LEVEL, {"model": "t5"}, "'t5'"),
        (BYTE_LEVEL, {"model": "no_vocab"}, "holds no vocabulary; set tokenizer"),
        (BYTE_LEVEL, {"model": None}, "holds no vocabulary"),
        (BYTE_LEVEL, {"pre": "made-up"}, "tokenizer.ggml.pre in .* is 'made-up'; pdray knows .*llama-bpe"),
        (BYTE_LEVEL, {"pre": "kimi-k2"}, "'kimi-k2'"),
        (BYTE_LEVEL, {"pre": None}, "lacks tokenizer.ggml.pre"),
        (BYTE_LEVEL, {"merges": None}, "lacks the metadata field tokenizer.ggml.merges"),
        (BYTE_LEVEL, {"merges": ["he"]}, "'he', which is no pair"),
        (BYTE_LEVEL, {"merges": ["he nobody"]}, "contradicts itself.*nobody"),
        (BYTE_LEVEL, {"token_type": KINDS[1:]}, "token_type in .* elements for"),
        (BYTE_LEVEL, {"token_type": [9, *KINDS[1:]]}, r"token_type .*not known: \[9\]"),
        (BYTE_LEVEL, {"tokens": [*TOKENS[:-1], "hello"]}, "'hello' twice"),
        (BYTE_LEVEL, {"bos_token_id": 9999}, "bos_token_id in .* is 9999, but the vocabulary has"),
        (BYTE_LEVEL, {"padding_token_id": 9999}, "padding_token_id in .* is 9999"),
        (BYTE_LEVEL, {"bos_token_id": None, "add_bos_token": True}, "no tokenizer.ggml.bos_token_id"),
        (BYTE_LEVEL, {"eos_token_id": None, "add_eos_token": True}, "no tokenizer.ggml.eos_token_id"),
        (BYTE_LEVEL, {"add_space_prefix": True}, "add_space_prefix in .* is true"),
        (BYTE_LEVEL, {"add_sep_token": True}, "add_sep_token in .* is in use"),
        (BYTE_LEVEL, {"suppress_tokens": [3]}, "suppress_tokens in .* is in use"),
        (BYTE_LEVEL, {"split_on_moonlight": True}, "does not know: tokenizer.ggml.split_on_moonlight"),
        (BYTE_LEVEL, {"tokenizer.moonlight.scores": [1]}, "does not know: tokenizer.moonlight.scores"),
        (BYTE_LEVEL, {"added_tokens": ["<nobody>"]}, "added_tokens in .* names '<nobody>'"),
        (SENTENCEPIECE, {"scores": PIECE_SCORES[1:]}, "scores in .* elements for"),
        (SENTENCEPIECE, {"precompiled_charsmap": [1, 2]}, "precompiled_charsmap in .* is in use"),
    ],
)
def test_what_is_not_known_is_named(
    base: dict[str, Any], changes: dict[str, Any], named: str, convert: Convert
) -> None:
    with pytest.raises(ModelLoadError, match=named):
        convert(base, **changes)
