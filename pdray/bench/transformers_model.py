"""The transformers model that holds the same weights as pdray's decoder, to compare speed and tokens with."""

from __future__ import annotations

from typing import Any

import torch

from pdray.errors import ConfigError
from pdray.models import LoadedModel, ModelConfig
from pdray.models.model_config import FREQUENCY_FACTORS

MODEL_TYPES = {"LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3"}


def transformers_config(config: ModelConfig) -> Any:
    """The PretrainedConfig of the same shape and constants.

    Raises:
        ConfigError: rotary frequencies that only a GGUF file can state.
    """
    from transformers import AutoConfig

    scaling = config.rope_scaling or {"rope_type": "default"}
    if scaling["rope_type"] == FREQUENCY_FACTORS:
        raise ConfigError("this GGUF file's rotary frequencies have no transformers config; compare with a folder's")
    fields: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": scaling | {"rope_theta": config.rope_theta},
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": None,  # as with ignore_eos: never stop there, and never avoid it either
    }
    if config.architecture != "Qwen2ForCausalLM":  # its biases are fixed
        fields["attention_bias"] = config.qkv_bias
    if config.architecture == "LlamaForCausalLM":
        fields["mlp_bias"] = config.mlp_bias
    return AutoConfig.for_model(MODEL_TYPES[config.architecture], **fields)


def transformers_model(model: LoadedModel) -> Any:
    """A transformers model with a copy of the decoder's weights, on its device and in its dtype.

    Raises:
        ConfigError: as transformers_config.
    """
    from transformers import AutoModelForCausalLM

    parameters = model.decoder.parameters()
    device = next(iter(parameters.values())).device
    with torch.device(device):
        twin = AutoModelForCausalLM.from_config(transformers_config(model.config), dtype=model.dtype)
    missing, unexpected = twin.load_state_dict(parameters, strict=False)
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    assert set(missing) <= tied and not unexpected, f"missing {missing}, unexpected {unexpected}"
    return twin.eval()
