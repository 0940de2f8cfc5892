"""A GGUF file written as llama.cpp's converter writes it gives transformers' logits back."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

from pdray.config import Config
from pdray.errors import ModelLoadError
from pdray.models import load_model, load_model_config
from pdray.testing.rank_threads import run_ranks

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


def add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """A metadata field of the type that llama.cpp writes."""
    if isinstance(value, list):
        writer.add_array(key, value)
    else:
        kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        kinds[type(value)](key, value)


def write_gguf(model: Any, file: Path, quantization: gguf.GGMLQuantizationType = F32, **metadata: Any) -> None:
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
        if value is not None:
            add(writer, key.replace("__", "."), value)
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


@pytest.mark.parametrize("name", ["llama-biases", "qwen2", "qwen3"])
def test_each_rank_loads_its_part(name: str, tmp_path: Path, hf_model: Any) -> None:
    architecture, overrides = MODELS[name]
    config = Config(model=str(tmp_path / "model.gguf"))
    write_gguf(hf_model(architecture, **SIZES, **overrides), tmp_path / "model.gguf", gguf.GGMLQuantizationType.Q8_0)
    whole = load_model(config, CPU).decoder.parameters()
    for loaded in run_ranks(2, lambda group: load_model(config, CPU, group=group)):
        cuts = loaded.decoder.cuts()
        assert "model.layers.0.self_attn.q_proj.weight" in cuts
        for name, parameter in loaded.decoder.parameters().items():
            expected = whole[name][cuts[name].indices] if name in cuts else whole[name]
            assert torch.equal(parameter, expected), name


LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
# Rope keys of a file whose model has plain rotary embedding, and the rope parameters they mean.
ROPE_KEYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "scale_linear": ({"rope__scale_linear": 4.0}, LINEAR),
    "factor-without-a-type": ({"rope__scaling__factor": 4.0}, LINEAR),
    "linear": ({"rope__scaling__type": "linear", "rope__scaling__factor": 4.0}, LINEAR),
    "new-key-wins": ({"rope__scaling__factor": 4.0, "rope__scale_linear": 8.0}, LINEAR),
    "none": ({"rope__scaling__type": "none", "rope__scaling__factor": 4.0}, {"rope_type": "default"}),
    "finetuned": ({"rope__scaling__finetuned": True, "rope__scale_linear": 1.0}, {"rope_type": "default"}),
    "yarn": (
        {
            "rope__scaling__type": "yarn",
            "rope__scaling__factor": 4.0,
            "rope__scaling__original_context_length": 32,
            "rope__scaling__yarn_beta_fast": 24.0,
            "rope__scaling__yarn_beta_slow": 2.0,
        },
        {**YARN, "beta_fast": 24.0, "beta_slow": 2.0},
    ),
    "yarn-attn-factor": (
        {
            "rope__scaling__type": "yarn",
            "rope__scaling__factor": 4.0,
            "rope__scaling__original_context_length": 32,
            "rope__scaling__attn_factor": 1.5,
        },
        {**YARN, "attention_factor": 1.5 * (0.1 * math.log(4.0) + 1.0)},
    ),
}


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen3ForCausalLM"])
@pytest.mark.parametrize("name", ROPE_KEYS)
def test_rope_keys_mean_what_transformers_computes(
    name: str, architecture: str, tmp_path: Path, hf_model: Any, paged: Any, tokens: Any, reference_logits: Any
) -> None:
    keys, rope_parameters = ROPE_KEYS[name]
    prefix = architecture.removesuffix("ForCausalLM").lower()
    write_gguf(
        hf_model(architecture, **SIZES, head_dim=16),
        tmp_path / "model.gguf",
        **{f"{prefix}__{key}": value for key, value in keys.items()},
    )
    scaled = hf_model(architecture, **SIZES, head_dim=16, rope_parameters={"rope_theta": 1e4, **rope_parameters})
    prompt = tokens(60)
    logits = paged(load_model(Config(model=str(tmp_path / "model.gguf")), CPU).decoder).run(prompt)
    torch.testing.assert_close(logits, reference_logits(scaled, prompt), atol=1e-4, rtol=1e-4)


def test_frequency_factors_and_linear_scaling_multiply(tmp_path: Path, hf_model: Any) -> None:
    model = hf_model("LlamaForCausalLM", **SIZES, rope_parameters=LLAMA3)
    write_gguf(model, tmp_path / "plain.gguf")
    write_gguf(model, tmp_path / "scaled.gguf", llama__rope__scaling__factor=2.0)
    plain, scaled = (load_model_config(Config(model=str(tmp_path / f"{n}.gguf"))) for n in ("plain", "scaled"))
    assert plain.rope_scaling is not None and scaled.rope_scaling is not None
    assert scaled.rope_scaling["factors"] == [2 * factor for factor in plain.rope_scaling["factors"]]
    write_gguf(model, tmp_path / "yarn.gguf", llama__rope__scaling__type="yarn", llama__rope__scaling__factor=2.0)
    with pytest.raises(ModelLoadError, match="both rope_freqs.weight and rope.scaling.type yarn"):
        load_model_config(Config(model=str(tmp_path / "yarn.gguf")))


def test_numbers_may_be_given_for_each_layer(tmp_path: Path, hf_model: Any) -> None:
    model = hf_model("LlamaForCausalLM", **SIZES)
    write_gguf(model, tmp_path / "model.gguf")
    expected = load_model_config(Config(model=str(tmp_path / "model.gguf")))
    write_gguf(model, tmp_path / "layers.gguf", llama__attention__head_count_kv=[2, 2])
    assert load_model_config(Config(model=str(tmp_path / "layers.gguf"))) == expected
    write_gguf(model, tmp_path / "layers.gguf", llama__attention__head_count_kv=[2, 4])
    with pytest.raises(ModelLoadError, match="head_count_kv in .* differs from layer to layer"):
        load_model_config(Config(model=str(tmp_path / "layers.gguf")))


def test_keys_without_effect(tmp_path: Path, hf_model: Any) -> None:
    model = hf_model("LlamaForCausalLM", **SIZES)
    write_gguf(model, tmp_path / "plain.gguf")
    write_gguf(
        model,
        tmp_path / "model.gguf",
        llama__vocab_size=211,
        llama__attention__value_length=16,
        llama__attention__causal=True,
        llama__attention__sliding_window=4096,
        llama__attention__scale=0.25,
        llama__expert_count=0,
        llama__logit_scale=1.0,
        llama__tensor_data_layout="Meta AI original pth",
        general__name="somebody's model",
        somebody__own__key="their business",
    )
    expected = load_model_config(Config(model=str(tmp_path / "plain.gguf")))
    assert load_model_config(Config(model=str(tmp_path / "model.gguf"))) == expected


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
        ({"general__type": "adapter"}, "general.type 'adapter'"),
        (
            {"llama__rope__scaling__type": "longrope"},
            "scaling.type in .* is 'longrope'; pdray knows none, linear, yarn",
        ),
        ({"llama__rope__scaling__factor": -2.0}, "factor in .* is -2.0"),
        ({"llama__rope__scaling__attn_factor": 1.5}, "attn_factor in .* is 1.5 with rope.scaling.type linear"),
        ({"llama__rope__scaling__alpha": 1000.0}, "rope.scaling.alpha in .* is 1000.0"),
        ({"llama__rope__scale": 2.0}, "llama.rope.scale in .* is 2.0"),
        ({"llama__rope__dimension_sections": [4, 4]}, "does not know: llama.rope.dimension_sections"),
        ({"llama__moonlight": 1, "llama__sunlight": 1}, "does not know: llama.moonlight, llama.sunlight"),
        ({"llama__attention__sliding_window": 64}, "sliding_window in .* is 64, less than the context length"),
        ({"llama__attention__causal": False}, "attention.causal in .* is False"),
        ({"llama__attention__scale": 0.5}, "attention.scale in .* is 0.5"),
        ({"llama__attention__value_length": 8}, "value_length in .* is 8, but a head has 16"),
        ({"llama__final_logit_softcapping": 30.0}, "final_logit_softcapping in .* is 30.0"),
        ({"llama__logit_scale": 0.5}, "logit_scale in .* is 0.5"),
        ({"llama__pooling_type": 3}, "pooling_type in .* is 3"),
        ({"llama__vocab_size": 999}, "vocab_size in .* is 999, but token_embd.weight has 211"),
        ({"llama__tensor_data_layout": "sideways"}, "tensor_data_layout in .* is 'sideways'"),
    ],
)
def test_unknown_kinds_are_named(metadata: dict[str, Any], named: str, tmp_path: Path, hf_model: Any) -> None:
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
