"""A sequence ends at what the model's config, its generation config or its tokenizer names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from tokenizers import Tokenizer, models

from pdray.config import Config
from pdray.models import load_model, load_model_config, load_tokenizer

TOKENS = ["a", "b", "<|endoftext|>", "<|im_end|>", "<|eot_id|>", "c"]


@pytest.fixture
def folder(tmp_path: Path, hf_model: Any) -> Path:
    """A model that ends at 2 by its config.json and at 5 by its generation_config.json."""
    model = hf_model("Qwen2ForCausalLM", eos_token_id=2, vocab_size=6)
    model.generation_config.eos_token_id = [2, 5]
    model.save_pretrained(tmp_path)
    return tmp_path


def save_tokenizer(folder: Path, eos: Any, where: str = "tokenizer.json") -> None:
    if where == "tokenizer.json":
        tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(TOKENS)}, "a"))
        tokenizer.add_special_tokens(TOKENS[2:5])
        tokenizer.save(str(folder / "tokenizer.json"))
    elif where in ("vocab.json", "added_tokens.json"):
        (folder / where).write_text(json.dumps({token: i for i, token in enumerate(TOKENS)}))
    settings: dict[str, Any] = {"eos_token": eos}
    if where == "added_tokens_decoder":
        settings["added_tokens_decoder"] = {str(i): {"content": token} for i, token in enumerate(TOKENS)}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize("where", ["tokenizer.json", "vocab.json", "added_tokens.json", "added_tokens_decoder"])
@pytest.mark.parametrize("eos", ["<|im_end|>", {"content": "<|im_end|>", "special": True}])
def test_the_tokenizers_end_counts_beside_the_models(where: str, eos: Any, folder: Path) -> None:
    assert load_model_config(Config(model=str(folder))).eos_token_ids == (2, 5)
    save_tokenizer(folder, eos, where)
    assert load_model_config(Config(model=str(folder))).eos_token_ids == (2, 5, 3)
    assert load_model(Config(model=str(folder)), torch.device("cpu")).config.eos_token_ids == (2, 5, 3)
    assert load_model_config(Config(model=str(folder), skip_tokenizer_init=True)).eos_token_ids == (2, 5)


def test_it_is_the_token_that_the_routers_tokenizer_ends_with(folder: Path) -> None:
    save_tokenizer(folder, "<|eot_id|>")
    tokenizer = load_tokenizer(Config(model=str(folder)))
    assert tokenizer is not None
    assert tokenizer.eos_token_id in load_model_config(Config(model=str(folder))).eos_token_ids


def test_special_tokens_map_and_another_folders_tokenizer(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(other, None)
    (other / "special_tokens_map.json").write_text('{"eos_token": "<|eot_id|>"}')
    config = Config(model=str(folder), tokenizer=str(other))
    assert load_model_config(config).eos_token_ids == (2, 5, 4)


def test_a_token_outside_the_vocabulary_ends_nothing(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_tokenizer(folder, "<|nobody|>")
    assert load_model_config(Config(model=str(folder))).eos_token_ids == (2, 5)
    assert "<|nobody|>" in caplog.text


def test_another_generation_config(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.mktemp("generation") / "generation_config.json"
    file.write_text('{"eos_token_id": 1}')
    for given in (file, file.parent):
        assert load_model_config(Config(model=str(folder), generation_config=str(given))).eos_token_ids == (1, 2)
    assert load_model_config(Config(model=str(folder), generation_config="vllm")).eos_token_ids == (2, 5)


@pytest.mark.parametrize(
    ("kinds", "ids", "expected"),
    [
        ([1, 1, 3, 3, 3, 1], {"eos": 2}, (2, 3, 4)),
        ([1, 1, 3, 4, 1, 1], {"eos": 2}, (2, 3)),  # a plain token that looks like an end is text
        ([1, 1, 1, 1, 1, 1], {"eos": 2, "eot": 3, "eom": 5}, (2, 3, 5)),
        ([1, 1, 3, 3, 3, 1], {}, (2, 3, 4)),
        (None, {"eos": 0}, (0,)),
    ],
)
def test_a_gguf_names_ends_by_id_and_by_token(
    kinds: list[int] | None, ids: dict[str, int], expected: tuple[int, ...], tmp_path: Path
) -> None:
    from pdray.models.gguf_file import GGUFFile
    from pdray.models.gguf_vocabulary import end_token_ids

    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    if kinds is not None:
        writer.add_token_types(kinds)
    for name, token_id in ids.items():
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", token_id)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert tuple(end_token_ids(GGUFFile(tmp_path / "model.gguf"))) == expected
