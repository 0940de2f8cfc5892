"""ModelConfig reads what transformers writes, old format and new, and refuses what the decoder does not compute."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pdray.errors import ModelLoadError
from pdray.models.model_config import ModelConfig
from pdray.models.rope import build_rotary_table

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "eos_token_id": 7,
    "bos_token_id": 1,
}
LLAMA3_SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}


def test_reads_a_plain_llama() -> None:
    config = ModelConfig.from_hf(LLAMA)
    assert (config.architecture, config.num_layers, config.num_heads, config.num_kv_heads) == (
        "LlamaForCausalLM",
        2,
        4,
        2,
    )
    assert config.head_dim == 16 and config.num_heads == 2 * config.num_kv_heads
    assert config.rope_theta == 500000.0 and config.rope_scaling is None
    assert not (config.qkv_bias or config.o_bias or config.mlp_bias or config.qk_norm)
    assert config.tie_word_embeddings and config.torch_dtype == "bfloat16"
    assert config.eos_token_ids == (7,) and config.max_model_len == 4096


def test_families_differ_as_in_transformers() -> None:
    qwen2 = ModelConfig.from_hf({**LLAMA, "architectures": ["Qwen2ForCausalLM"]})
    qwen3 = ModelConfig.from_hf({**LLAMA, "architectures": ["Qwen3ForCausalLM"]})
    assert qwen2.qkv_bias and not qwen2.o_bias and not qwen2.qk_norm and qwen2.head_dim == 16
    assert qwen3.qk_norm and not qwen3.qkv_bias and qwen3.head_dim == 128


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn", "llama3"])
def test_both_formats_of_rope_mean_the_same(kind: str) -> None:
    scaling = LLAMA3_SCALING if kind == "llama3" else {"factor": 4.0}
    old = ModelConfig.from_hf({**LLAMA, "rope_scaling": {"type": kind, **scaling}})
    new = {key: value for key, value in LLAMA.items() if key not in ("rope_theta", "torch_dtype")}
    new |= {"rope_parameters": {"rope_type": kind, "rope_theta": 500000.0, **scaling}, "dtype": "bfloat16"}
    assert ModelConfig.from_hf(new) == old
    assert old.max_model_len == (4096 if kind == "llama3" else 16384)


def test_yarn_factor_defaults_to_the_ratio_of_lengths() -> None:
    config = ModelConfig.from_hf({**LLAMA, "rope_scaling": {"type": "yarn", "original_max_position_embeddings": 1024}})
    assert config.rope_scaling is not None and config.rope_scaling["factor"] == 4.0
    assert config.max_model_len == 4096


def test_end_tokens_come_from_the_generation_config_too() -> None:
    config = ModelConfig.from_hf(LLAMA, {"eos_token_id": [9, 7]})
    assert config.eos_token_ids == (9, 7)
    assert ModelConfig.from_hf({**LLAMA, "eos_token_id": None}).eos_token_ids == ()


def test_model_type_stands_in_for_a_missing_architecture() -> None:
    bare = {key: value for key, value in LLAMA.items() if key != "architectures"}
    assert ModelConfig.from_hf({**bare, "model_type": "qwen3"}).architecture == "Qwen3ForCausalLM"


def test_an_unused_sliding_window_is_no_obstacle() -> None:
    config = {**LLAMA, "sliding_window": 4096, "use_sliding_window": False, "layer_types": ["full_attention"] * 2}
    assert ModelConfig.from_hf(config) == ModelConfig.from_hf(LLAMA)


def test_neutral_values_of_other_families_fields_are_no_obstacle() -> None:
    neutral = {"logit_scale": 1.0, "num_experts": 0, "scale_emb": None, "residual_multiplier": 1, "is_causal": True}
    assert ModelConfig.from_hf({**LLAMA, **neutral}) == ModelConfig.from_hf(LLAMA)
    assert ModelConfig.from_hf({**LLAMA, "sliding_window": 4096}) == ModelConfig.from_hf(LLAMA)
    qwen2 = {**LLAMA, "architectures": ["Qwen2ForCausalLM"]}
    assert ModelConfig.from_hf({**qwen2, "sliding_window": 512}) == ModelConfig.from_hf(qwen2)


def test_rope_parameters_of_the_only_kind_of_layer() -> None:
    scaling = {"rope_type": "linear", "rope_theta": 500000.0, "factor": 4.0}
    flat = ModelConfig.from_hf({**LLAMA, "rope_theta": None, "rope_parameters": scaling})
    assert ModelConfig.from_hf({**LLAMA, "rope_theta": None, "rope_parameters": {"full_attention": scaling}}) == flat
    assert flat.rope_theta == 500000.0 and flat.rope_scaling == {"rope_type": "linear", "factor": 4.0}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "MambaForCausalLM.*LlamaForCausalLM, Qwen2ForCausalLM"),
        ({"architectures": None, "model_type": "gpt2"}, "gpt2.*LlamaForCausalLM"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'.*silu"),
        ({"sliding_window": 512, "use_sliding_window": True}, "sliding_window is 512.*full attention"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "longrope.*linear, dynamic, yarn, llama3"),
        ({"rope_scaling": {"rope_type": "linear"}}, "linear needs factor"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor, high_freq_factor"),
        ({"quantization_config": {"quant_method": "awq"}}, "awq"),
        ({"sliding_window": 512}, "sliding_window is 512.*full attention"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "alpha": 3}}, "alpha=3, which pdray does not know"),
        ({"rope_scaling": {"rope_type": "default", "mrope_section": [4, 4]}}, r"mrope_section=\[4, 4\]"),
        ({"rope_theta": None, "rope_parameters": {"sliding_attention": {}, "full_attention": {}}}, "sliding_attention"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
        ({"scale_emb": 12}, "scale_emb is 12"),
        ({"num_local_experts": 8}, "num_local_experts is 8"),
        ({"attention_multiplier": 0.01}, "attention_multiplier is 0.01"),
        ({"no_rope_layers": [1, 0]}, "no_rope_layers"),
        ({"hidden_activation": "gelu"}, "hidden_activation is 'gelu'"),
        ({"num_attention_heads": 5, "num_key_value_heads": 2, "head_dim": 16}, "5, not a multiple .*2"),
        ({"head_dim": 15}, "head_dim is 15"),
        ({"num_hidden_layers": 0}, "num_layers is 0"),
        ({"hidden_size": None}, "no hidden_size"),
    ],
)
def test_refusals_name_the_value_and_what_is_known(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelLoadError, match=named):
        ModelConfig.from_hf({**LLAMA, **change})


def test_rotary_rows_do_not_depend_on_the_tables_length() -> None:
    for scaling in (None, {"type": "dynamic", "factor": 3.0}, {"type": "yarn", "factor": 2.0}):
        config = ModelConfig.from_hf({**LLAMA, "max_position_embeddings": 64, "rope_scaling": scaling})
        short, long = (build_rotary_table(config, length, torch.device("cpu")) for length in (100, 150))
        assert torch.equal(short.cos, long.cos[:100]) and torch.equal(short.sin, long.sin[:100])
        assert short.cos.shape == (100, 8) and short.cos.dtype == torch.float32
