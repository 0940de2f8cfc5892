"""Byte-level tokenizers of other families than SmolLM2, from a GGUF with a tiny vocabulary."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import gguf
import pytest
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

from pdray.models.gguf_tokenizer import convert_tokenizer

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ hello", "1 2", "12 3", "ã ģ", "Ċ Ċ", "Ġ Ġ", "' s"]
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEXT = "hello  hello's 12345\n\n x=1231 <|im_start|>あé<think>!!\r\n  end"


def write_vocabulary(file: Path, arch: str, pre: str) -> list[str]:
    tokens = [*BYTES, *(merge.replace(" ", "") for merge in MERGES), *CONTROL, "<think>"]
    kinds = [gguf.TokenType.NORMAL] * (len(tokens) - 4) + [gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.USER_DEFINED]
    writer = gguf.GGUFWriter(file, arch)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(tokens.index("<|endoftext|>"))
    writer.add_eos_token_id(tokens.index("<|im_end|>"))
    writer.add_chat_template("{{ messages }}")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tokens


@pytest.mark.parametrize("pre", ["qwen2", "llama-bpe", "gpt-2", "smollm"])
def test_round_trip_and_special_tokens(pre: str, tmp_path: Path) -> None:
    tokens = write_vocabulary(tmp_path / "model.gguf", "qwen2", pre)
    convert_tokenizer(tmp_path / "model.gguf", tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    token_ids = tokenizer(TEXT).input_ids
    starts_with_bos = pre == "llama-bpe"
    assert (token_ids[0] == tokens.index("<|endoftext|>")) == starts_with_bos
    assert tokenizer.decode(token_ids[starts_with_bos:]) == unicodedata.normalize("NFC", TEXT)
    assert tokens.index("<think>") in token_ids and tokens.index("<|im_start|>") in token_ids
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|endoftext|>", "<|im_end|>")
    assert tokenizer.chat_template == "{{ messages }}"
    digits = {"qwen2": ["1", "2", "3"], "smollm": ["1", "2", "3"]}.get(pre, ["123"])
    assert tokenizer.tokenize("123") == digits
