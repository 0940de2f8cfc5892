"""Splits of byte-level vocabularies: each name of tokenizer.ggml.pre against the family's own tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import regex
from tokenizers import Regex, pre_tokenizers
from transformers import GPT2Tokenizer, Qwen2Tokenizer
from transformers.convert_slow_tokenizer import TikTokenConverter

from pdray.models.splits import SPLITS

TEXTS = [
    "1234",
    "x=12345.67, 2024-01-31",
    "don't DON'T I'll we've y'all's",
    "HelloWorld helloWORLD fooBar",
    "你好，世界！ 東京は晴れ",
    "a  b   c    ",
    "one\ntwo\n\nthree \n four\r\n\tfive",
    "¿Qué? — «naïve café», Straße №5 ½ ²",
    "🙂🇩🇪👩‍👩‍👧 привет",
    "  lead",
    "path/to//file.py //comment\n",
    "",
]
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
TEKKEN_PATTERN = (  # as published with Mistral's tekken.json
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def pieces(pre: str, text: str) -> list[str]:
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in SPLITS[pre].patterns]
    return [piece for piece, _ in pre_tokenizers.Sequence(splits).pre_tokenize_str(text)]


def of_tokenizer(tokenizer: Any, text: str) -> list[str]:
    """Split by a transformers tokenizer's own pre-tokenizer, as characters of the text."""
    spans = [span for _, span in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)]
    return [text[start:end] for start, end in spans]


@pytest.mark.parametrize("text", TEXTS)
def test_llama3_splits_as_transformers_converts_it(text: str, tmp_path: Path) -> None:
    pattern = TikTokenConverter(vocab_file=str(tmp_path / "none")).pattern
    for pre in ("llama-bpe", "llama3", "llama-v3", "falcon3", "smaug-bpe"):
        assert pieces(pre, text) == regex.findall(pattern, text), pre


@pytest.mark.parametrize("text", TEXTS)
def test_qwen2_and_gpt2_split_as_their_tokenizers_do(text: str) -> None:
    assert pieces("qwen2", text) == of_tokenizer(Qwen2Tokenizer(vocab={}, merges=[]), text)
    assert pieces("gpt-2", text) == of_tokenizer(GPT2Tokenizer(vocab={}, merges=[]), text)


@pytest.mark.parametrize("text", TEXTS)
def test_tekken_splits_as_published(text: str) -> None:
    assert pieces("tekken", text) == regex.findall(TEKKEN_PATTERN, text)


@pytest.mark.parametrize("text", TEXTS)
def test_smollm_and_starcoder_split_digits_and_then_as_gpt2(text: str) -> None:
    expected = [piece for part in regex.findall(r"\p{N}|\P{N}+", text) for piece in regex.findall(GPT2_PATTERN, part)]
    assert pieces("smollm", text) == pieces("starcoder", text) == pieces("refact", text) == expected


@pytest.mark.parametrize(
    ("pre", "text", "expected"),
    [
        ("gpt-2", "1234", ["1234"]),
        ("smollm", "1234", ["1", "2", "3", "4"]),
        ("qwen2", "1234", ["1", "2", "3", "4"]),
        ("deepseek-r1-qwen", "1234", ["1", "2", "3", "4"]),
        ("tekken", "1234", ["1", "2", "3", "4"]),
        ("deepseek-llm", "1234", ["1", "2", "3", "4"]),
        ("deepseek-coder", "1234", ["1", "2", "3", "4"]),
        ("seed-coder", "1234", ["1", "2", "3", "4"]),
        ("viking", "1234", ["1", "2", "3", "4"]),
        ("llama-bpe", "1234", ["123", "4"]),
        ("smaug-bpe", "1234", ["123", "4"]),
        ("gpt-4o", "1234", ["123", "4"]),
        ("deepseek-v3", "1234", ["123", "4"]),
        ("minicpm5", "1234", ["123", "4"]),
        ("default", "1234", ["123", "4"]),
        ("default", "a+b", ["a", "+", "b"]),
        ("gpt-4o", "DON'T don't", ["DON'T", " don't"]),
        ("llama-bpe", "DON'T", ["DON", "'T"]),
        ("gpt-2", "DON'T", ["DON", "'", "T"]),
        ("tekken", "fooBar", ["foo", "Bar"]),
        ("llama-bpe", "fooBar", ["fooBar"]),
        ("deepseek-llm", "Zürich 你好!", ["Z", "ü", "rich", " ", "你好", "!"]),  # :-~ has letters, too
        ("deepseek-llm", "привет мир\n", ["привет", " мир", "\n"]),
        ("deepseek-v3", "日本 语!", ["日本", " ", "语", "!"]),
        ("deepseek-coder", "foo(bar)\n", ["foo", "(", "bar", ")", "\n"]),
        ("viking", "Hei, verden!", ["Hei", ",", " verden", "!"]),
    ],
)
def test_splits(pre: str, text: str, expected: list[str]) -> None:
    assert pieces(pre, text) == expected


@pytest.mark.parametrize("pre", SPLITS)
def test_every_split_keeps_every_character(pre: str) -> None:
    for text in TEXTS:
        assert "".join(pieces(pre, text)) == text
