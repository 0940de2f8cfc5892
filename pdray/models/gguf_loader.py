"""Weights from a GGUF file (llama.cpp), dequantised tensor by tensor.

Tensor names and layout: llama.cpp's convert_hf_to_gguf.py.
"""

from __future__ import annotations

import torch

from pdray.models.gguf_config import ROPE_FACTORS, per_model
from pdray.models.gguf_file import GGUFFile
from pdray.models.safetensors_loader import check_complete, copy_checked
from pdray.models.shards import Cut

PERMUTED_ARCHITECTURE = "llama"
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


def load_gguf(file: GGUFFile, parameters: dict[str, torch.Tensor], cuts: dict[str, Cut]) -> None:
    """Dequantise every tensor into the parameter of its Hugging Face name.

    Args:
        cuts: see Part.cuts(). Of a tensor that is cut, too, all is dequantised: for a moment, on the host.

    Raises:
        ModelLoadError: an unknown quantisation, or tensors are missing, unexpected or of another shape.
    """
    loaded: set[str] = set()
    unexpected: list[str] = []
    for gguf_name in file.tensors:
        name = hf_name(gguf_name)
        if name is not None and name in parameters:
            copy_checked(name, _load_tensor(file, gguf_name), parameters[name], file.path, cuts.get(name))
            loaded.add(name)
        elif not _is_ignorable(gguf_name):
            unexpected.append(gguf_name)
    check_complete(file.path, parameters, loaded, unexpected)


def _is_ignorable(gguf_name: str) -> bool:
    """Frequency factors, which are part of the configuration, and the frequencies that old files carry."""
    return gguf_name == ROPE_FACTORS or gguf_name.endswith("attn_rot_embd.weight")


def _load_tensor(file: GGUFFile, gguf_name: str) -> torch.Tensor:
    weight = file.dequantized(gguf_name)
    part = gguf_name.split(".")[-2]
    if file.architecture == PERMUTED_ARCHITECTURE and part in ("attn_q", "attn_k"):
        num_heads = per_model(file, "attention.head_count")
        heads = num_heads if part == "attn_q" else per_model(file, "attention.head_count_kv", num_heads)
        return undo_permutation(weight, heads)
    return weight


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
