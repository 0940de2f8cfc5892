"""Tokenizers: from a folder, and from the default model's GGUF through a cache that processes may race for."""

from __future__ import annotations

import importlib.util
import json
import threading
from pathlib import Path
from typing import Any

import pytest

from pdray.config import Config
from pdray.errors import ModelLoadError
from pdray.models import gguf_tokenizer, load_tokenizer, tokenizer
from pdray.models.resolve import DEFAULT_MODEL_PACKAGE, resolve_local

TEXTS = [
    "The capital of France is",
    "  two spaces,\ttab\nnewline\n\n  and trailing  ",
    "Zürich – naïve café, 北京, привет, 🙂🇩🇪👩‍👩‍👧",
    "x = 12345 + 67.89 # 2024-01-31",
    "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n",
    "don't you've I'LL",
    "",
]


@pytest.fixture(scope="module")
def gguf_file() -> Path:
    if importlib.util.find_spec(DEFAULT_MODEL_PACKAGE) is None:
        pytest.skip("the default model's wheel is not installed")
    source = resolve_local(Config().model)
    assert source is not None
    return source.path


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An empty cache, filled by whichever test comes first."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PDRAY_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def converted(gguf_file: Path, cache: Path) -> Any:
    return load_tokenizer(Config())


@pytest.fixture(scope="module")
def by_transformers(gguf_file: Path) -> Any:
    """transformers' own conversion; its pre-tokenizer gives the same ids, as no merge of SmolLM2 joins digits."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)


@pytest.mark.parametrize("text", TEXTS)
def test_converted_tokenizer_equals_transformers(text: str, converted: Any, by_transformers: Any) -> None:
    token_ids = converted(text).input_ids
    assert token_ids == by_transformers(text).input_ids
    assert converted.decode(token_ids) == text


def test_special_tokens_are_single_and_skipped_on_request(converted: Any) -> None:
    token_ids = converted("<|im_start|>user<|im_end|>").input_ids
    assert (token_ids[0], token_ids[-1]) == (1, 2)
    assert converted.decode(token_ids, skip_special_tokens=True) == "user"
    assert converted.eos_token_id == 2


def test_the_chat_template_survives_the_cache(converted: Any, cache: Path) -> None:
    again = load_tokenizer(Config())
    assert again is not None and again.chat_template == converted.chat_template
    messages = [{"role": "user", "content": "Hi"}]
    prompt = again.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert isinstance(prompt, str)
    assert prompt.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert len(list((cache / "tokenizers").iterdir())) == 1


def test_a_second_start_does_not_convert(converted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_tokenizer, "convert_tokenizer", lambda *_: pytest.fail("converted again"))
    assert load_tokenizer(Config()) is not None


def test_processes_that_race_find_one_whole_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PDRAY_CACHE", str(tmp_path / "cache"))
    (tmp_path / "model.gguf").touch()
    both_started = threading.Barrier(2, timeout=30)
    conversions: list[Path] = []

    def convert(gguf_file: Path, folder: Path) -> None:
        conversions.append(folder)
        (folder / "tokenizer.json").write_text("whole")
        both_started.wait()

    monkeypatch.setattr(gguf_tokenizer, "convert_tokenizer", convert)
    found: list[Path] = []
    threads = [
        threading.Thread(target=lambda: found.append(tokenizer.converted_tokenizer(tmp_path / "model.gguf")))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(conversions)) == 2 and len(found) == 2 and found[0] == found[1]
    assert (found[0] / "tokenizer.json").read_text() == "whole"
    assert list(found[0].parent.iterdir()) == [found[0]]


def test_a_failed_conversion_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PDRAY_CACHE", str(tmp_path / "cache"))
    (tmp_path / "model.gguf").write_bytes(b"no GGUF")
    with pytest.raises(ModelLoadError, match="cannot read .*model.gguf as GGUF"):
        load_tokenizer(Config(model=str(tmp_path / "model.gguf")))
    assert list((tmp_path / "cache" / "tokenizers").iterdir()) == []


def test_a_folders_tokenizer_beside_another_model(converted: Any, tmp_path: Path) -> None:
    converted.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    loaded = load_tokenizer(Config(model="nobody/has-this", tokenizer=str(tmp_path)))
    assert loaded is not None and loaded("Hi there").input_ids == converted("Hi there").input_ids


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
@pytest.mark.parametrize("named", ["LlamaTokenizerFast", "LlamaTokenizer", "Qwen2Tokenizer", None])
def test_a_tokenizer_json_is_taken_as_it_stands(
    named: str | None, model_type: str, converted: Any, tmp_path: Path
) -> None:
    """Whatever class tokenizer_config.json names, as DeepSeek's distilled Llamas name sentencepiece's."""
    converted.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    settings = {"eos_token": "<|im_end|>", "chat_template": "{{ messages }}", "tokenizer_class": named}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in settings.items() if v}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    loaded = load_tokenizer(Config(model=str(tmp_path)))
    assert loaded is not None and loaded.is_fast
    assert (loaded.eos_token_id, loaded.chat_template) == (2, "{{ messages }}")
    for text in TEXTS:
        assert loaded(text).input_ids == converted(text).input_ids
        assert loaded.decode(loaded(text).input_ids) == text


def test_a_folder_with_nothing_but_a_tokenizer(converted: Any, tmp_path: Path) -> None:
    converted.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(Config(tokenizer=str(tmp_path)))
    assert loaded is not None and loaded("Hi there").input_ids == converted("Hi there").input_ids


def test_no_tokenizer(tmp_path: Path) -> None:
    assert load_tokenizer(Config(model="nobody/has-this", skip_tokenizer_init=True)) is None
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ModelLoadError, match="skip_tokenizer_init=true"):
        load_tokenizer(Config(model=str(tmp_path)))
    with pytest.raises(ModelLoadError, match="has no tokenizer; set tokenizer"):
        load_tokenizer(Config(model=str(tmp_path / "config.json")))
