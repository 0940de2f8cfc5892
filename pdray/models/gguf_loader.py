"""Models from GGUF files (llama.cpp): configuration from the metadata, weights dequantised tensor by tensor.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; tensor names and layout: llama.cpp's
convert_hf_to_gguf.py.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGMLQuantizationType, GGUFReader, dequantize
from gguf.gguf_reader import ReaderTensor

from pdray.errors import ModelLoadError
from pdray.models.model_config import FREQUENCY_FACTORS, ModelConfig
from pdray.models.safetensors_loader import check_complete, copy_checked

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
PERMUTED_ARCHITECTURE = "llama"
ROPE_FACTORS = "rope_freqs.weight"
TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
DTYPE_NAMES = {GGMLQuantizationType.F32: "float32", GGMLQuantizationType.F16: "float16"}


class ArrayReader(GGUFReader):
    """A GGUFReader over a plain array: np.memmap's subclass hooks make parsing a vocabulary 3.5 times slower."""

    @property  # type: ignore[override]
    def data(self) -> npt.NDArray[Any]:
        return self._data

    @data.setter
    def data(self, memory_map: npt.NDArray[Any]) -> None:
        self._data = memory_map.view(np.ndarray)


class GGUFFile:
    """One memory-mapped .gguf file.

    Raises:
        ModelLoadError: from the constructor, not a GGUF file, or of an architecture that pdray does not know.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._reader = ArrayReader(path)
        except (OSError, ValueError, IndexError, KeyError, UnicodeDecodeError) as error:
            raise ModelLoadError(f"cannot read {path} as GGUF: {error}") from error
        self.path = path
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        self._architecture = str(self.field("general.architecture", ""))
        if self._architecture not in ARCHITECTURES:
            raise ModelLoadError(
                f"{path} has general.architecture {self._architecture!r}; pdray knows {', '.join(ARCHITECTURES)}"
            )
        if self.field("split.count", 1) > 1:
            raise ModelLoadError(
                f"{path} is one of {self.field('split.count')} parts; merge them with llama-gguf-split"
            )

    def model_config(self) -> ModelConfig:
        """The metadata, as far as the decoder needs it."""
        hidden_size, num_heads = self._model_field("embedding_length"), self._model_field("attention.head_count")
        head_dim = self._model_field("attention.key_length", hidden_size // num_heads)
        rotated = self._model_field("rope.dimension_count", head_dim)
        if self._model_field("expert_count", 0):
            raise ModelLoadError(f"{self.path} is a mixture of experts; pdray knows dense models")
        config = ModelConfig.from_hf(
            {
                "architectures": [ARCHITECTURES[self._architecture]],
                "vocab_size": int(self._tensor("token_embd.weight").shape[1]),
                "hidden_size": hidden_size,
                "intermediate_size": self._model_field("feed_forward_length"),
                "num_hidden_layers": self._model_field("block_count"),
                "num_attention_heads": num_heads,
                "num_key_value_heads": self._model_field("attention.head_count_kv", num_heads),
                "head_dim": head_dim,
                "partial_rotary_factor": rotated / head_dim,
                "rms_norm_eps": self._model_field("attention.layer_norm_rms_epsilon"),
                "rope_theta": self._model_field("rope.freq_base", 10000.0),
                "rope_scaling": self._rope_scaling(),
                "max_position_embeddings": self._model_field("context_length"),
                "tie_word_embeddings": "output.weight" not in self._tensors,
                "attention_bias": "blk.0.attn_q.bias" in self._tensors,
                "mlp_bias": "blk.0.ffn_down.bias" in self._tensors,
                "bos_token_id": self.field("tokenizer.ggml.bos_token_id", None),
                "eos_token_id": self._eos_token_ids(),
                "dtype": DTYPE_NAMES.get(self._tensor("blk.0.attn_q.weight").tensor_type, "bfloat16"),
            }
        )
        if ROPE_FACTORS in self._tensors:
            factors = self._dequantized(self._tensor(ROPE_FACTORS)).tolist()
            config = dataclasses.replace(config, rope_scaling={"rope_type": FREQUENCY_FACTORS, "factors": factors})
        return config

    def load(self, parameters: dict[str, torch.Tensor]) -> None:
        """Dequantise every tensor into the parameter of its Hugging Face name.

        Raises:
            ModelLoadError: an unknown quantisation, or tensors are missing, unexpected or of another shape.
        """
        loaded: set[str] = set()
        unexpected: list[str] = []
        for gguf_name, tensor in self._tensors.items():
            name = hf_name(gguf_name)
            if name is not None and name in parameters:
                copy_checked(name, self._load_tensor(gguf_name, tensor), parameters[name], self.path)
                loaded.add(name)
            elif gguf_name != ROPE_FACTORS:
                unexpected.append(gguf_name)
        check_complete(self.path, parameters, loaded, unexpected)

    def _load_tensor(self, gguf_name: str, tensor: ReaderTensor) -> torch.Tensor:
        weight = self._dequantized(tensor)
        part = gguf_name.split(".")[-2]
        if self._architecture == PERMUTED_ARCHITECTURE and part in ("attn_q", "attn_k"):
            num_heads = self._model_field("attention.head_count")
            heads = num_heads if part == "attn_q" else self._model_field("attention.head_count_kv", num_heads)
            return undo_permutation(weight, heads)
        return weight

    def _dequantized(self, tensor: ReaderTensor) -> torch.Tensor:
        try:
            values = dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise ModelLoadError(f"{tensor.name} in {self.path} is {tensor.tensor_type.name}: {error}") from error
        return torch.from_numpy(values if values.flags.writeable else values.copy())

    def _tensor(self, name: str) -> ReaderTensor:
        if name not in self._tensors:
            raise ModelLoadError(f"{self.path} lacks the tensor {name}")
        return self._tensors[name]

    def _rope_scaling(self) -> dict[str, Any] | None:
        """transformers' rope parameters of the rope.scaling fields."""
        rope_type = self._model_field("rope.scaling.type", "none")
        if rope_type == "none":
            return None
        keys = {
            "factor": "factor",
            "original_context_length": "original_max_position_embeddings",
            "yarn_beta_fast": "beta_fast",
            "yarn_beta_slow": "beta_slow",
        }
        values = {hf: self._model_field(f"rope.scaling.{key}", None) for key, hf in keys.items()}
        return {"rope_type": rope_type, **{key: value for key, value in values.items() if value is not None}}

    def _eos_token_ids(self) -> list[int]:
        """End of sequence, of turn and of message, as far as the file names them."""
        ids = [self.field(f"tokenizer.ggml.{kind}_token_id", None) for kind in ("eos", "eot", "eom")]
        return [token_id for token_id in ids if token_id is not None]

    def _model_field(self, key: str, *default: Any) -> Any:
        return self.field(f"{self._architecture}.{key}", *default)

    def field(self, key: str, *default: Any) -> Any:
        """A metadata value as Python's own types; ModelLoadError if it is absent and there is no default."""
        field = self._reader.fields.get(key)
        if field is not None:
            return field.contents()
        if not default:
            raise ModelLoadError(f"{self.path} lacks the metadata field {key}")
        return default[0]


def hf_name(gguf_name: str) -> str | None:
    """Hugging Face name of a GGUF tensor, e.g. blk.3.attn_q.weight; None if there is none."""
    *path, kind = gguf_name.split(".")
    if len(path) == 1 and path[0] in TOP_NAMES:
        return f"{TOP_NAMES[path[0]]}.{kind}"
    if len(path) == 3 and path[0] == "blk" and path[2] in LAYER_NAMES:
        return f"model.layers.{path[1]}.{LAYER_NAMES[path[2]]}.{kind}"
    return None


def undo_permutation(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Rows of a llama query or key projection, from llama.cpp's interleaved pairs back to halves.

    Inverse of LlamaModel.permute in convert_hf_to_gguf.py; weight or bias, [num_heads * head_dim, ...].
    """
    half = weight.shape[0] // num_heads // 2
    return weight.view(num_heads, half, 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)
