"""A model's shape and constants for the decoder, read from a Hugging Face config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pdray.errors import ModelLoadError

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")
FREQUENCY_FACTORS = "frequency_factors"  # GGUF's way to write llama3 scaling: a divisor for each frequency
ROPE_TYPES_WITH_ORIGINAL_LENGTH = ("yarn", "llama3")
ROPE_FIELDS = {
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "factor",
    "finetuned",
    "high_freq_factor",
    "low_freq_factor",
    "mscale",
    "mscale_all_dim",
    "original_max_position_embeddings",
    "truncate",
}
# Fields of relatives of these families, each with the values at which it leaves the function as it is computed here.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "alibi": (False,),
    "attention_multiplier": (),
    "attn_logit_softcapping": (),
    "clip_qkv": (),
    "compression_config": ({},),
    "dim_model_base": (),
    "embedding_multiplier": (1,),
    "final_logit_softcapping": (),
    "hidden_activation": ("silu", "swish"),
    "is_causal": (True,),
    "is_encoder_decoder": (False,),
    "logit_scale": (1,),
    "logits_scaling": (1,),
    "n_routed_experts": (0,),
    "no_rope_layer_interval": (0,),
    "no_rope_layers": ([],),
    "num_experts": (0,),
    "num_local_experts": (0, 1),
    "parallel_attn": (False,),
    "residual_multiplier": (1,),
    "rope_pct": (1,),
    "rotary_pct": (1,),
    "scale_depth": (),
    "scale_emb": (1,),
    "use_parallel_residual": (False,),
}
REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


@dataclass(frozen=True, slots=True)
class Family:
    """The rules by which one architecture reads its config.

    Attributes:
        qkv_bias, o_bias: fixed by the architecture, or None where attention_bias decides.
        qk_norm: RMSNorm over each head's queries and keys before the rotation.
        head_dim: default where the config has none; None is hidden_size // num_attention_heads.
        max_position_embeddings: default where the config has none.
    """

    qkv_bias: bool | None
    o_bias: bool | None
    qk_norm: bool
    head_dim: int | None
    max_position_embeddings: int


FAMILIES = {
    "LlamaForCausalLM": Family(None, None, False, None, 2048),
    "Qwen2ForCausalLM": Family(True, False, False, None, 32768),
    "Qwen3ForCausalLM": Family(None, None, True, 128, 32768),
}


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Shape and constants of one model.

    Attributes:
        rope_scaling: None for plain rotary embedding, else transformers' rope parameters: "rope_type",
            "factor" and what else the type takes, without rope_theta.
        max_position_embeddings: positions the model was made for; see max_model_len.
        initializer_range: standard deviation of dummy weights.
        eos_token_ids: any of them ends a completion.
        torch_dtype: dtype of the checkpoint, e.g. "bfloat16".
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict[str, Any] | None
    max_position_embeddings: int
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    initializer_range: float
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    torch_dtype: str

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads"):
            if getattr(self, name) < 1:
                raise ModelLoadError(f"{name} is {getattr(self, name)}; a model needs at least 1")
        if self.num_heads % self.num_kv_heads:
            raise ModelLoadError(
                f"num_attention_heads is {self.num_heads}, not a multiple of num_key_value_heads ({self.num_kv_heads})"
            )
        if self.head_dim < 2 or self.head_dim % 2:
            raise ModelLoadError(f"head_dim is {self.head_dim}; rotary embedding needs an even number of at least 2")

    @property
    def max_model_len(self) -> int:
        """The longest sequence, in tokens, that the model's position embedding is meant for.

        linear and dynamic scaling stretch max_position_embeddings by their factor; yarn stretches the original
        length; llama3 configs state the stretched length already.
        """
        scaling = self.rope_scaling
        if scaling is None or scaling["rope_type"] in ("llama3", FREQUENCY_FACTORS):
            return self.max_position_embeddings
        if scaling["rope_type"] == "yarn":
            stretched = int(scaling["original_max_position_embeddings"] * scaling["factor"])
            return max(self.max_position_embeddings, stretched)
        return int(self.max_position_embeddings * max(1.0, scaling["factor"]))

    @staticmethod
    def from_hf(config: Mapping[str, Any], generation_config: Mapping[str, Any] | None = None) -> ModelConfig:
        """Read a config.json, as transformers 4 or 5 writes it, and its generation_config.json if there is one.

        Raises:
            ModelLoadError: the architecture or an option in use is not implemented, or a value is missing.
        """
        architecture = _architecture(config)
        family = FAMILIES[architecture]
        missing = [name for name in REQUIRED if config.get(name) is None]
        if missing:
            raise ModelLoadError(f"the model's config.json has no {', '.join(missing)}")
        _refuse_unsupported(config, architecture)

        hidden_size, num_heads = config["hidden_size"], config["num_attention_heads"]
        max_positions = config.get("max_position_embeddings") or family.max_position_embeddings
        rope_theta, rope_scaling = _rope(config, max_positions)
        attention_bias = bool(config.get("attention_bias", False))
        return ModelConfig(
            architecture=architecture,
            vocab_size=config["vocab_size"],
            hidden_size=hidden_size,
            intermediate_size=config["intermediate_size"],
            num_layers=config["num_hidden_layers"],
            num_heads=num_heads,
            num_kv_heads=config.get("num_key_value_heads") or num_heads,
            head_dim=config.get("head_dim") or family.head_dim or hidden_size // num_heads,
            rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            max_position_embeddings=max_positions,
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=attention_bias if family.qkv_bias is None else family.qkv_bias,
            o_bias=attention_bias if family.o_bias is None else family.o_bias,
            mlp_bias=architecture == "LlamaForCausalLM" and bool(config.get("mlp_bias", False)),
            qk_norm=family.qk_norm,
            initializer_range=float(config.get("initializer_range", 0.02)),
            eos_token_ids=_eos_token_ids(config, generation_config),
            bos_token_id=config.get("bos_token_id"),
            torch_dtype=_dtype_name(config),
        )


def _architecture(config: Mapping[str, Any]) -> str:
    known = ", ".join(FAMILIES)
    for name in config.get("architectures") or ():
        if name in FAMILIES:
            return str(name)
    if config.get("architectures"):
        raise ModelLoadError(f"the model's architecture is {config['architectures']}; pdray knows {known}")
    by_model_type = {name.removesuffix("ForCausalLM").lower(): name for name in FAMILIES}
    model_type = config.get("model_type")
    if model_type not in by_model_type:
        raise ModelLoadError(
            f"the model's config.json names no architecture and its model_type is {model_type!r}; pdray knows {known}"
        )
    return by_model_type[model_type]


def _refuse_unsupported(config: Mapping[str, Any], architecture: str) -> None:
    """Raise for options that would change the function that the decoder computes."""
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise ModelLoadError(f"hidden_act is {activation!r}; pdray knows silu")
    quantization = config.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method", "unnamed")
        raise ModelLoadError(f"the weights are quantised ({method}); pdray reads unquantised safetensors and GGUF")
    for name, neutral in NEUTRAL.items():
        value = config.get(name)
        if value is not None and value not in neutral:
            raise ModelLoadError(
                f"{name} is {value!r} in the model's config.json, which changes what the model computes and is not "
                f"known to pdray; it serves models with {' or '.join(map(repr, (None, *neutral)))} there"
            )
    _refuse_windows(config, architecture)


def _refuse_windows(config: Mapping[str, Any], architecture: str) -> None:
    """Llama's relatives use a window that is given; Qwen's only if use_sliding_window says so."""
    window = config.get("sliding_window") or 0
    in_use = config.get("use_sliding_window")
    if in_use is None:
        in_use = architecture == "LlamaForCausalLM" and window < (config.get("max_position_embeddings") or 0)
    layer_types = set(config.get("layer_types") or ()) - {"full_attention"}
    if (window and in_use and not config.get("layer_types")) or layer_types:
        raise ModelLoadError(
            f"sliding_window is {config.get('sliding_window')} and in use "
            f"(layer_types {sorted(layer_types) or 'by max_window_layers'}); pdray knows full attention"
        )


def _rope(config: Mapping[str, Any], max_position_embeddings: int) -> tuple[float, dict[str, Any] | None]:
    """rope_theta and the scaling parameters, from rope_parameters (transformers 5) or rope_theta and rope_scaling."""
    parameters = _rope_parameters(config)
    theta = float(parameters.pop("rope_theta", None) or config.get("rope_theta") or 10000.0)
    legacy_type = parameters.pop("type", None)
    rope_type = parameters.pop("rope_type", None) or legacy_type or "default"
    partial = parameters.pop("partial_rotary_factor", None) or config.get("partial_rotary_factor") or 1.0
    if partial != 1.0:
        raise ModelLoadError(f"partial_rotary_factor is {partial}; pdray rotates whole heads (1.0)")
    if rope_type not in ROPE_TYPES:
        raise ModelLoadError(f"rope_type is {rope_type!r}; pdray knows {', '.join(ROPE_TYPES)}")
    unknown = sorted(set(parameters) - ROPE_FIELDS)
    if unknown:
        raise ModelLoadError(
            f"the model's rope parameters have {', '.join(f'{name}={parameters[name]!r}' for name in unknown)}, which "
            f"pdray does not know; it knows {', '.join(sorted(ROPE_FIELDS))}"
        )
    if rope_type == "default":
        return theta, None

    if rope_type in ROPE_TYPES_WITH_ORIGINAL_LENGTH:
        original = config.get("original_max_position_embeddings")  # wins in transformers, too
        original = original or parameters.get("original_max_position_embeddings") or max_position_embeddings
        parameters["original_max_position_embeddings"] = original
        if rope_type == "yarn" and parameters.get("factor") is None:
            parameters["factor"] = max_position_embeddings / original
    needed = ["factor", "low_freq_factor", "high_freq_factor"] if rope_type == "llama3" else ["factor"]
    missing = [name for name in needed if parameters.get(name) is None]
    if missing:
        raise ModelLoadError(f"rope_type {rope_type} needs {', '.join(missing)}, which the model's config.json lacks")
    return theta, {"rope_type": rope_type, **parameters}


def _rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """rope_scaling, which wins in transformers, too, or rope_parameters, which may be given for each kind of layer."""
    parameters = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    nested = {name: value for name, value in parameters.items() if isinstance(value, dict)}
    if nested.keys() - {"full_attention"}:
        raise ModelLoadError(
            f"the model has rope parameters for layers of {', '.join(sorted(nested))}; pdray knows full_attention only"
        )
    return dict(nested["full_attention"]) if nested else parameters


def _eos_token_ids(config: Mapping[str, Any], generation_config: Mapping[str, Any] | None) -> tuple[int, ...]:
    """The generation config's end tokens first, then the model's, without repetition."""
    found: list[int] = []
    for source in (generation_config or {}, config):
        value = source.get("eos_token_id")
        found += [] if value is None else value if isinstance(value, list) else [value]
    return tuple(dict.fromkeys(found))


def _dtype_name(config: Mapping[str, Any]) -> str:
    """transformers 5 writes dtype, 4 wrote torch_dtype; neither means float32."""
    return str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
