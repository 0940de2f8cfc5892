"""Weights saved by transformers, whole or in shards, arrive in the right place; what does not fit is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pdray.config import Config
from pdray.errors import ConfigError, ModelLoadError
from pdray.models import load_model, load_model_config

CPU = torch.device("cpu")


def edit_weights(folder: Path, **changes: torch.Tensor | None) -> None:
    """Replace, add or (None) remove tensors of the folder's single file; __ stands for a dot."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name, tensor in changes.items():
        tensors.pop(name.replace("__", "."), None)
        if tensor is not None:
            tensors[name.replace("__", ".")] = tensor
    save_file(tensors, file)


@pytest.mark.parametrize("shard_size", ["10GB", "20KB"])
@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"])
def test_round_trip(
    architecture: str, shard_size: str, tmp_path: Path, hf_model: Any, paged: Any, tokens: Any, reference_logits: Any
) -> None:
    model = hf_model(architecture, head_dim=8, tie_word_embeddings=architecture == "Qwen2ForCausalLM")
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard_size == "20KB")

    loaded = load_model(Config(model=str(tmp_path)), CPU)
    prompt = tokens(20)
    logits = paged(loaded.decoder).run(prompt)
    torch.testing.assert_close(logits, reference_logits(model, prompt), atol=1e-4, rtol=1e-4)
    assert loaded.dtype == torch.float32
    assert loaded.config == load_model_config(Config(model=str(tmp_path)))


@pytest.fixture
def saved(tmp_path: Path, hf_model: Any) -> Path:
    hf_model("LlamaForCausalLM").save_pretrained(tmp_path)
    return tmp_path


def test_the_fingerprint_tells_weights_and_dtype_apart(saved: Path) -> None:
    config = Config(model=str(saved))
    first = load_model(config, CPU).fingerprint
    assert load_model(config, CPU).fingerprint == first and len(first) == 16
    assert load_model(Config(model=str(saved), dtype="bfloat16"), CPU).fingerprint != first
    edit_weights(saved, model__norm__weight=torch.ones(48))
    assert load_model(config, CPU).fingerprint != first


def test_a_missing_tensor_is_named(saved: Path) -> None:
    edit_weights(saved, model__layers__1__self_attn__k_proj__weight=None)
    with pytest.raises(ModelLoadError, match="lacks 1 .*model.layers.1.self_attn.k_proj.weight"):
        load_model(Config(model=str(saved)), CPU)


def test_an_unexpected_tensor_is_named(saved: Path) -> None:
    edit_weights(saved, model__layers__0__self_attn__q_norm__weight=torch.ones(8))
    with pytest.raises(ModelLoadError, match="does not have: model.layers.0.self_attn.q_norm.weight"):
        load_model(Config(model=str(saved)), CPU)


def test_a_misshaped_tensor_is_named_with_both_shapes(saved: Path) -> None:
    edit_weights(saved, model__embed_tokens__weight=torch.ones(210, 48))
    with pytest.raises(ModelLoadError, match=r"embed_tokens.weight .*\(210, 48\).*\(211, 48\)"):
        load_model(Config(model=str(saved)), CPU)


def test_old_checkpoints_rotary_buffers_are_ignored(saved: Path) -> None:
    edit_weights(saved, model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(4))
    load_model(Config(model=str(saved)), CPU)


def test_a_broken_file_is_named(saved: Path) -> None:
    (saved / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(ModelLoadError, match="cannot read .*model.safetensors"):
        load_model(Config(model=str(saved)), CPU)


def test_a_missing_shard_is_named(saved: Path) -> None:
    (saved / "model.safetensors").unlink()
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (saved / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelLoadError, match="model-00001-of-00002.safetensors, not found"):
        load_model(Config(model=str(saved)), CPU)


def test_a_folder_without_weights(saved: Path) -> None:
    (saved / "model.safetensors").unlink()
    with pytest.raises(ModelLoadError, match="no .safetensors file.*load_format=dummy"):
        load_model(Config(model=str(saved)), CPU)


def test_max_model_len_is_held_to_the_models_limit(saved: Path) -> None:
    assert load_model(Config(model=str(saved), max_model_len=100), CPU).decoder.max_len == 100
    with pytest.raises(ConfigError, match="max_model_len is 129.*128"):
        load_model(Config(model=str(saved), max_model_len=129), CPU)
