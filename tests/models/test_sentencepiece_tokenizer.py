"""Sentencepiece vocabularies, from a folder's tokenizer.model and from a GGUF, against sentencepiece itself."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import gguf
import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from pdray.config import Config
from pdray.errors import ModelLoadError
from pdray.models import load_tokenizer

CORPUS = [
    "The lighthouse keeper wrote in his journal every evening, and he read what he had written.",
    "A short list of colors: red, green, blue, and 1234 others; don't count them twice!",
    "Zürich ist schön, und der See ist nicht weit. Wo ist der See? Er ist hier.",
    "def count(words):\n    return sum(1 for word in words if word)",
    "Once upon a time there was a king who had three daughters, and the youngest was the wisest.",
] * 20
TEXTS = [
    "The king had three daughters",
    "  two spaces  inside and  two behind  ",
    "def f(x):\n\treturn x\n\n",
    "don't 1234 x=12",
    "héllo 日本語 🙂",
    " ",
    "ﬁ ½ ｆｕｌｌ",
]
LLAMA = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "byte_fallback": True}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {**LLAMA, "split_digits": True},
    "no-prefix": {**LLAMA, "add_dummy_prefix": False},
    "no-bytes": {**LLAMA, "byte_fallback": False},
    "nmt_nfkc": {"byte_fallback": True},
    "unigram": {**LLAMA, "model_type": "unigram"},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder with a tokenizer.model and a config.json for each kind."""
    root = tmp_path_factory.mktemp("sentencepiece")
    for name, options in KINDS.items():
        (root / name).mkdir()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(CORPUS),
            model_prefix=str(root / name / "tokenizer"),
            vocab_size=380,
            hard_vocab_limit=False,
            num_threads=1,
            minloglevel=2,
            **{"model_type": "bpe", **options},
        )
        (root / name / "config.json").write_text('{"model_type": "llama"}')
    return {name: root / name for name in KINDS}


def reference(folder: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


def load(path: Path) -> Any:
    return load_tokenizer(Config(model=str(path)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_with_only_a_tokenizer_model(kind: str, folders: dict[str, Path]) -> None:
    tokenizer, expected = load(folders[kind]), reference(folders[kind])
    assert tokenizer.is_fast
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == ("<s>", "</s>", "<unk>")
    for text in TEXTS:
        token_ids = tokenizer(text).input_ids
        assert token_ids == [1, *expected.encode(text)], text
        if 0 not in token_ids:
            assert tokenizer.decode(token_ids[1:]) == expected.decode(token_ids[1:])


@pytest.mark.parametrize("kind", ["llama", "no-prefix", "no-bytes"])
def test_the_same_vocabulary_in_a_gguf(
    kind: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PDRAY_CACHE", str(tmp_path / "cache"))
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString((folders[kind] / "tokenizer.model").read_bytes())
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list([piece.piece for piece in proto.pieces])
    writer.add_token_scores([piece.score for piece in proto.pieces])
    writer.add_token_types([piece.type for piece in proto.pieces])
    if kind == "no-prefix":
        writer.add_add_space_prefix(False)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tokenizer, expected = load(tmp_path / "model.gguf"), reference(folders[kind])
    for text in TEXTS:
        assert tokenizer(text).input_ids == [1, *expected.encode(text)], text


def copy(folder: Path, target: Path, **settings: Any) -> Path:
    for name in ("tokenizer.model", "config.json"):
        (target / name).write_bytes((folder / name).read_bytes())
    (target / "tokenizer_config.json").write_text(json.dumps(settings))
    return target


def test_settings_beside_it_count(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = copy(
        folders["llama"],
        tmp_path,
        tokenizer_class="LlamaTokenizer",
        add_bos_token=False,
        add_eos_token=True,
        legacy=False,
        chat_template="{{ bos_token }}{{ messages[0].content }}",
    )
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": {"content": "<|im_end|>"}, "pad_token": "<pad>"}')
    size = reference(folder).get_piece_size()
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|im_end|>": size, "<pad>": size + 1}))
    tokenizer = load(folder)
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (size, size + 1)
    assert tokenizer("The king").input_ids == [*reference(folder).encode("The king"), size]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False) == "<s>Hi"
    # not legacy: what follows a special token does not begin with a space
    assert tokenizer.tokenize("<s>king")[1] == "k"


def test_a_tiktoken_vocabulary_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "tokenizer.model").write_text("IQ== 0\nIg== 1\nIw== 2\n")
    with pytest.raises(ModelLoadError, match="tokenizer.model is tiktoken's, and its folder has no tokenizer.json"):
        load(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"\x00nothing of the kind")
    with pytest.raises(ModelLoadError, match="tokenizer.model is not sentencepiece's"):
        load(tmp_path)
    (tmp_path / "tokenizer.model").rename(tmp_path / "qwen.tiktoken")
    with pytest.raises(ModelLoadError, match="tiktoken vocabulary .qwen.tiktoken. and no tokenizer.json"):
        load(tmp_path)


def test_a_missing_library_is_named(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ModelLoadError, match="needs the packages sentencepiece and protobuf"):
        load(folders["llama"])
