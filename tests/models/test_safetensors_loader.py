"""Weights saved by transformers, whole or in shards, arrive in the right place; what does not fit is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
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


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    file = folder / "model.safetensors"
    save_file({name: tensor.clone() for name, tensor in change(load_file(file)).items()}, file, {"format": "pt"})


def without_prefix(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}


def only_head(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        "lm_head.weight" if name == "model.embed_tokens.weight" else name: tensor for name, tensor in tensors.items()
    }


def both_equal(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}


def both_different(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].flip(0)}


def in_double(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.double() for name, tensor in tensors.items()}


CHANGES = {
    "as saved": lambda tensors: tensors,
    "only lm_head": only_head,
    "both, equal": both_equal,
    "both, different": both_different,
    "without prefix": without_prefix,
    "without prefix, only lm_head": lambda tensors: without_prefix(only_head(tensors)),
    "without prefix, both different": lambda tensors: without_prefix(both_different(tensors)),
    "float64": in_double,
}


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen3ForCausalLM"])
@pytest.mark.parametrize("name", CHANGES)
def test_tied_weights_load_as_transformers_loads_them(
    name: str, architecture: str, tmp_path: Path, hf_model: Any, paged: Any, tokens: Any, reference_logits: Any
) -> None:
    hf_model(architecture, head_dim=8, tie_word_embeddings=True).save_pretrained(tmp_path)
    rewrite(tmp_path, CHANGES[name])
    loaded = load_model(Config(model=str(tmp_path), dtype="float32"), CPU)
    assert loaded.config.tie_word_embeddings == ("different" not in name)
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    prompt = tokens(20)
    expected = reference_logits(reference, prompt)
    torch.testing.assert_close(paged(loaded.decoder).run(prompt), expected, atol=1e-4, rtol=1e-4)


def test_an_untied_model_without_its_prefix(saved: Path, paged: Any, tokens: Any, reference_logits: Any) -> None:
    prompt = tokens(20)
    expected = paged(load_model(Config(model=str(saved)), CPU).decoder).run(prompt)
    rewrite(saved, without_prefix)
    assert torch.equal(paged(load_model(Config(model=str(saved)), CPU).decoder).run(prompt), expected)


def test_half_of_an_untied_pair_is_not_enough(saved: Path) -> None:
    edit_weights(saved, model__embed_tokens__weight=None)
    with pytest.raises(ModelLoadError, match="lacks 1 .*model.embed_tokens.weight"):
        load_model(Config(model=str(saved)), CPU)


def test_a_whole_file_beside_a_stale_index(saved: Path) -> None:
    expected = load_model(Config(model=str(saved)), CPU).fingerprint
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (saved / "model.safetensors.index.json").write_text(json.dumps(index))
    assert load_model(Config(model=str(saved)), CPU).fingerprint == expected
    save_file({"lm_head.weight": torch.zeros(211, 48)}, saved / "model-00001-of-00002.safetensors")
    assert load_model(Config(model=str(saved)), CPU).fingerprint == expected


def test_a_tensor_that_is_there_twice_is_named(saved: Path) -> None:
    edit_weights(saved, norm__weight=torch.ones(48))
    with pytest.raises(ModelLoadError, match="model.norm.weight is in .*model.safetensors and as norm.weight in"):
        load_model(Config(model=str(saved)), CPU)
    edit_weights(saved, norm__weight=None)
    save_file({"model.norm.weight": torch.ones(48)}, saved / "more.safetensors")
    (saved / "model.safetensors").rename(saved / "most.safetensors")
    with pytest.raises(ModelLoadError, match="model.norm.weight is in .*more.safetensors and .*most.safetensors"):
        load_model(Config(model=str(saved)), CPU)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_quantised_tensors_are_named(dtype: torch.dtype, saved: Path) -> None:
    edit_weights(saved, model__layers__0__mlp__up_proj__weight=torch.ones(80, 48).to(dtype))
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(ModelLoadError, match=f"up_proj.weight in .* is {name}, so the weights are quantised"):
        load_model(Config(model=str(saved)), CPU)


@pytest.mark.parametrize("part", ["self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"])
def test_a_bias_that_the_config_does_not_announce_is_named(part: str, saved: Path) -> None:
    edit_weights(saved, **{f"model.layers.1.{part}.bias": torch.ones(48)})
    with pytest.raises(ModelLoadError, match=f"does not have: model.layers.1.{part}.bias"):
        load_model(Config(model=str(saved)), CPU)


@pytest.mark.parametrize("other", ["pytorch_model.bin", "consolidated.00.pth", "tf_model.h5", "model.gguf"])
def test_weights_in_another_format_are_named(other: str, saved: Path) -> None:
    (saved / "model.safetensors").rename(saved / other)
    with pytest.raises(ModelLoadError, match=f"no .safetensors file .it has {other}, which pdray does not read there"):
        load_model(Config(model=str(saved)), CPU)


def test_an_adapter_is_named(saved: Path) -> None:
    (saved / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelLoadError, match="holds a LoRA adapter"):
        load_model(Config(model=str(saved)), CPU)


def test_a_folder_without_weights(saved: Path) -> None:
    (saved / "model.safetensors").unlink()
    with pytest.raises(ModelLoadError, match="no .safetensors file.*load_format=dummy"):
        load_model(Config(model=str(saved)), CPU)


def test_max_model_len_is_held_to_the_models_limit(saved: Path) -> None:
    assert load_model(Config(model=str(saved), max_model_len=100), CPU).decoder.max_len == 100
    with pytest.raises(ConfigError, match="max_model_len is 129.*128"):
        load_model(Config(model=str(saved), max_model_len=129), CPU)
