"""The model's configuration from a GGUF file's metadata. Every key of the architecture is applied, known to be
without effect, or refused by name.

Keys: gguf.md; what llama.cpp does where one is absent: its llama-model.cpp.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from gguf import GGMLQuantizationType

from pdray.errors import ModelLoadError
from pdray.models.gguf_file import ARCHITECTURES, GGUFFile
from pdray.models.gguf_vocabulary import end_token_ids
from pdray.models.model_config import FREQUENCY_FACTORS, ModelConfig

ROPE_FACTORS = "rope_freqs.weight"
DTYPE_NAMES = {GGMLQuantizationType.F32: "float32", GGMLQuantizationType.F16: "float16"}

APPLIED = {
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.layer_norm_rms_epsilon",
    "attention.value_length",
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scale_linear",
    "rope.scaling.attn_factor",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.type",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
    "tensor_data_layout",
    "vocab_size",
}
WITHOUT_EFFECT = {
    "attention.layer_norm_epsilon",  # these architectures have no other norm than RMSNorm
    "rope.scaling.finetuned",  # says how the model was made
}
# The value at which a key leaves the function as pdray computes it.
NEUTRAL = {
    "attention.causal": True,
    "attention.clamp_kqv": 0,
    "attention.max_alibi_bias": 0,
    "attn_logit_softcapping": 0,
    "embedding_scale": 1,
    "expert_count": 0,
    "expert_shared_count": 0,
    "expert_used_count": 0,
    "final_logit_softcapping": 0,
    "leading_dense_block_count": 0,
    "logit_scale": 1,
    "nextn_predict_layers": 0,
    "pooling_type": 0,
    "residual_scale": 1,
    "rope.scale": 1,
    "rope.scaling.alpha": 0,
    "rope.scaling.yarn_attn_factor": 1,
    "rope.scaling.yarn_ext_factor": 1,
    "rope.scaling.yarn_log_multiplier": 0,
    "use_parallel_residual": False,
}
# llama's queries and keys are always stored permuted; older converters say so.
TENSOR_LAYOUTS = {"llama": ("Meta AI original pth",), "qwen2": ("reference",), "qwen3": ("reference",)}


def read_model_config(file: GGUFFile) -> ModelConfig:
    """The metadata, as far as the decoder needs it.

    Raises:
        ModelLoadError: a field is missing, unknown, or says something that pdray does not compute.
    """
    _refuse_unsupported(file)
    hidden_size, num_heads = file.model_field("embedding_length"), per_model(file, "attention.head_count")
    head_dim = file.model_field("attention.key_length", hidden_size // num_heads)
    _refuse_shapes(file, head_dim)
    config = ModelConfig.from_hf(
        {
            "architectures": [ARCHITECTURES[file.architecture]],
            "vocab_size": int(file.tensor("token_embd.weight").shape[1]),
            "hidden_size": hidden_size,
            "intermediate_size": per_model(file, "feed_forward_length"),
            "num_hidden_layers": file.model_field("block_count"),
            "num_attention_heads": num_heads,
            "num_key_value_heads": per_model(file, "attention.head_count_kv", num_heads),
            "head_dim": head_dim,
            "rms_norm_eps": file.model_field("attention.layer_norm_rms_epsilon"),
            "rope_theta": file.model_field("rope.freq_base", 10000.0),
            "rope_scaling": _rope_scaling(file),
            "max_position_embeddings": file.model_field("context_length"),
            "tie_word_embeddings": "output.weight" not in file.tensors,
            "attention_bias": "blk.0.attn_q.bias" in file.tensors,
            "mlp_bias": "blk.0.ffn_down.bias" in file.tensors,
            "bos_token_id": file.field("tokenizer.ggml.bos_token_id", None),
            "eos_token_id": end_token_ids(file),
            "dtype": DTYPE_NAMES.get(file.tensor("blk.0.attn_q.weight").tensor_type, "bfloat16"),
        }
    )
    return _with_frequency_factors(file, config)


def per_model(file: GGUFFile, key: str, *default: Any) -> int:
    """A number that GGUF may also write once for each layer."""
    value = file.model_field(key, *default)
    values = set(value) if isinstance(value, list) else {value}
    if len(values) != 1:
        raise ModelLoadError(
            f"{file.architecture}.{key} in {file.path} differs from layer to layer ({sorted(values)}); "
            "pdray knows models whose layers are alike"
        )
    return int(values.pop())


def _refuse_unsupported(file: GGUFFile) -> None:
    """Raise for keys that are unknown, or that would change the function that the decoder computes."""
    prefix = f"{file.architecture}."
    unknown = []
    for key in (key.removeprefix(prefix) for key in file.keys if key.startswith(prefix)):
        if key in NEUTRAL:
            value = file.model_field(key)
            if value != NEUTRAL[key]:
                raise ModelLoadError(
                    f"{prefix}{key} in {file.path} is {value!r}; pdray computes models with {NEUTRAL[key]!r} only"
                    + (" (not a mixture of experts)" if key.startswith("expert") else "")
                )
        elif key == "attention.sliding_window":
            window, length = file.model_field(key), file.model_field("context_length")
            if 0 < window < length:
                raise ModelLoadError(
                    f"{prefix}{key} in {file.path} is {window}, less than the context length ({length}); "
                    "pdray knows full attention"
                )
        elif key == "attention.scale":
            _refuse_scale(file)
        elif key not in APPLIED | WITHOUT_EFFECT:
            unknown.append(prefix + key)
    if unknown:
        raise ModelLoadError(f"{file.path} has metadata that pdray does not know: {', '.join(unknown)}")
    layout = file.model_field("tensor_data_layout", None)
    if layout is not None and layout not in TENSOR_LAYOUTS[file.architecture]:
        raise ModelLoadError(
            f"{prefix}tensor_data_layout in {file.path} is {layout!r}; "
            f"pdray knows {', '.join(TENSOR_LAYOUTS[file.architecture])}"
        )


def _refuse_scale(file: GGUFFile) -> None:
    head_dim = file.model_field(
        "attention.key_length", file.model_field("embedding_length") // per_model(file, "attention.head_count")
    )
    scale = file.model_field("attention.scale")
    if scale and abs(scale * head_dim**0.5 - 1) > 1e-4:
        raise ModelLoadError(
            f"{file.architecture}.attention.scale in {file.path} is {scale}; "
            f"pdray scales by 1 / sqrt(head size), here {head_dim**-0.5:.6g}"
        )


def _refuse_shapes(file: GGUFFile, head_dim: int) -> None:
    for key in ("attention.value_length", "rope.dimension_count"):
        length = file.model_field(key, head_dim)
        if length != head_dim:
            raise ModelLoadError(
                f"{file.architecture}.{key} in {file.path} is {length}, but a head has {head_dim} dimensions; "
                "pdray knows values as long as keys, and rotates whole heads"
            )
    num_tokens = int(file.tensor("token_embd.weight").shape[1])
    if file.model_field("vocab_size", num_tokens) != num_tokens:
        raise ModelLoadError(
            f"{file.architecture}.vocab_size in {file.path} is {file.model_field('vocab_size')}, "
            f"but token_embd.weight has {num_tokens} rows"
        )


def _rope_scaling(file: GGUFFile) -> dict[str, Any] | None:
    """transformers' rope parameters of the rope keys. A factor without a type is linear."""
    factor = float(file.model_field("rope.scaling.factor", None) or file.model_field("rope.scale_linear", None) or 1.0)
    if factor <= 0:
        raise ModelLoadError(f"the rope scaling factor in {file.path} is {factor}; it must be above 0")
    rope_type = file.model_field("rope.scaling.type", "linear")
    if rope_type not in ("none", "linear", "yarn"):
        raise ModelLoadError(
            f"{file.architecture}.rope.scaling.type in {file.path} is {rope_type!r}; pdray knows none, linear, yarn"
        )
    attention_factor = float(file.model_field("rope.scaling.attn_factor", 1.0))
    if rope_type != "yarn":
        if attention_factor != 1.0:
            raise ModelLoadError(
                f"{file.architecture}.rope.scaling.attn_factor in {file.path} is {attention_factor} with "
                f"rope.scaling.type {rope_type}; pdray knows it with yarn only"
            )
        return None if rope_type == "none" or factor == 1.0 else {"rope_type": "linear", "factor": factor}
    keys = {
        "original_context_length": "original_max_position_embeddings",
        "yarn_beta_fast": "beta_fast",
        "yarn_beta_slow": "beta_slow",
    }
    values = {hf: file.model_field(f"rope.scaling.{key}", None) for key, hf in keys.items()}
    scaling = {"rope_type": "yarn", "factor": factor}
    if attention_factor != 1.0:
        from pdray.models.rope import yarn_attention_factor

        scaling["attention_factor"] = attention_factor * yarn_attention_factor(scaling)
    return scaling | {key: value for key, value in values.items() if value is not None}


def _with_frequency_factors(file: GGUFFile, config: ModelConfig) -> ModelConfig:
    """The scaling with the frequency divisors that the file has as a tensor; linear scaling divides by one more."""
    if ROPE_FACTORS not in file.tensors:
        return config
    scaling = config.rope_scaling or {"rope_type": "linear", "factor": 1.0}
    if scaling["rope_type"] != "linear":
        raise ModelLoadError(
            f"{file.path} has both {ROPE_FACTORS} and rope.scaling.type {scaling['rope_type']}; pdray knows one of them"
        )
    factors = (file.dequantized(ROPE_FACTORS) * scaling["factor"]).tolist()
    if len(factors) != config.head_dim // 2:
        raise ModelLoadError(
            f"{ROPE_FACTORS} in {file.path} has {len(factors)} elements; a head of {config.head_dim} dimensions "
            f"has {config.head_dim // 2} frequencies"
        )
    return dataclasses.replace(config, rope_scaling={"rope_type": FREQUENCY_FACTORS, "factors": factors})
