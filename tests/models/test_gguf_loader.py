"""A GGUF file written as llama.cpp's converter writes it gives transformers' logits back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

from pdray.config import Config
from pdray.errors import ModelLoadError
from pdray.models import load_model, load_model_config

CPU = torch.device("cpu")
F32 = gguf.GGMLQuantizationType.F32
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {}),
    "llama-tied": ("LlamaForCausalLM", {"tie_word_embeddings": True}),
    "llama-biases": ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "llama-head-dim": ("LlamaForCausalLM", {"head_dim": 24}),
    "llama-yarn": ("LlamaForCausalLM", {"rope_parameters": YARN}),
    "llama-3.1": ("LlamaForCausalLM", {"rope_parameters": LLAMA3}),
    "qwen2": ("Qwen2ForCausalLM", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 24}),
}


def permute(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """LlamaModel.permute of llama.cpp's convert_hf_to_gguf.py."""
    halves = weight.reshape(num_heads, 2, weight.shape[0] // num_heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(model: Any, file: Path, quantization: gguf.GGMLQuantizationType = F32, **metadata: int) -> None:
    """Write a transformers model: matrices quantised, vectors in float32."""
    config = model.config
    arch = config.model_type
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer = gguf.GGUFWriter(file, arch)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_eos_token_id(2)
    writer.add_eot_token_id(5)
    for key, value in metadata.items():
        writer.add_uint32(key.replace("__", "."), value)
    rope = config.rope_parameters
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    elif rope["rope_type"] == "llama3":
        plain = rope["rope_theta"] ** -(torch.arange(0, head_dim, 2).float() / head_dim)
        writer.add_tensor("rope_freqs.weight", (plain / model.model.rotary_emb.inv_freq).numpy())

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        values = (permute(tensor, heads) if arch == "llama" and heads else tensor).contiguous().numpy()
        kind = F32 if values.ndim == 1 else quantization
        gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        writer.add_tensor(gguf_name, gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_transformers(
    name: str, tmp_path: Path, hf_model: Any, paged: Any, tokens: Any, reference_logits: Any
) -> None:
    architecture, overrides = MODELS[name]
    model = hf_model(architecture, **SIZES, **overrides)
    file = tmp_path / "model.gguf"
    write_gguf(model, file)
    loaded = load_model(Config(model=str(file)), CPU)
    prompt = tokens(60)
    logits = paged(loaded.decoder).run(prompt)
    torch.testing.assert_close(logits, reference_logits(model, prompt), atol=1e-4, rtol=1e-4)
    assert loaded.config == load_model_config(Config(model=str(file)))
    assert loaded.config.eos_token_ids == (2, 5)
    assert loaded.config.torch_dtype == "float32"


@pytest.mark.parametrize("kind", ["Q8_0", "F16", "BF16"])
def test_quantised_weights_arrive_as_the_gguf_package_reads_them(kind: str, tmp_path: Path, hf_model: Any) -> None:
    quantization = gguf.GGMLQuantizationType[kind]
    model = hf_model("Qwen3ForCausalLM", **SIZES, head_dim=16)
    file = tmp_path / "model.gguf"
    write_gguf(model, file, quantization)
    parameters = load_model(Config(model=str(file)), CPU).decoder.parameters()
    for name, tensor in model.named_parameters():
        values = tensor.detach().numpy()
        if values.ndim > 1:
            values = gguf.dequantize(gguf.quantize(values, quantization), quantization)
        assert torch.equal(parameters[name], torch.from_numpy(values)), name


@pytest.mark.parametrize(
    ("metadata", "named"),
    [
        ({"llama__expert_count": 8}, "mixture of experts"),
        ({"split__count": 2}, "one of 2 parts"),
    ],
)
def test_unknown_kinds_are_named(metadata: dict[str, int], named: str, tmp_path: Path, hf_model: Any) -> None:
    write_gguf(hf_model("LlamaForCausalLM", **SIZES), tmp_path / "model.gguf", **metadata)
    with pytest.raises(ModelLoadError, match=named):
        load_model_config(Config(model=str(tmp_path / "model.gguf")))


def test_missing_and_unexpected_tensors_are_named(tmp_path: Path, hf_model: Any) -> None:
    model = hf_model("LlamaForCausalLM", **SIZES)
    del model.model.layers[1].mlp.up_proj
    write_gguf(model, tmp_path / "model.gguf")
    with pytest.raises(ModelLoadError, match="lacks 1 .*model.layers.1.mlp.up_proj.weight"):
        load_model(Config(model=str(tmp_path / "model.gguf")), CPU)

    model = hf_model("Qwen2ForCausalLM", **SIZES)
    model.model.layers[0].self_attn.o_proj = torch.nn.Linear(64, 64)
    write_gguf(model, tmp_path / "model.gguf")
    with pytest.raises(ModelLoadError, match="does not have: blk.0.attn_output.bias"):
        load_model(Config(model=str(tmp_path / "model.gguf")), CPU)


def test_an_unknown_architecture_is_named(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelLoadError, match="'mamba'; pdray knows llama, qwen2, qwen3"):
        load_model_config(Config(model=str(tmp_path / "model.gguf")))


@pytest.mark.parametrize("content", [b"", b"GG", b"nothing of the kind", b"GGUF\x03\x00\x00\x00"])
def test_a_broken_file_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(ModelLoadError, match="cannot read .*model.gguf"):
        load_model_config(Config(model=str(tmp_path / "model.gguf")))
