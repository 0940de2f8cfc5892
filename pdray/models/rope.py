"""Rotary position embedding: frequencies of every known scaling, and the table of cosines and sines.

Formulas as in transformers' modeling_rope_utils: linear (kaiokendev), dynamic NTK (emozilla), YaRN (Peng et al.,
2023, arXiv:2309.00071), Llama 3.1 (Meta's reference code).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from pdray.models.model_config import FREQUENCY_FACTORS, ModelConfig


class RotaryTable(NamedTuple):
    """Attributes:
    cos, sin: [max_len, head_dim / 2] float32; row p belongs to position p. One table serves all layers.
    """

    cos: torch.Tensor
    sin: torch.Tensor


def build_rotary_table(config: ModelConfig, max_len: int, device: torch.device) -> RotaryTable:
    """Cosines and sines of positions 0 to max_len - 1, attention factor included.

    dynamic: transformers recomputes the frequencies of a whole forward pass from the longest position in it, so
    that what a token's key becomes depends on how the prompt was cut. Here row p holds the frequencies for a sequence
    of p + 1 tokens: a pure function of the position, which caching, chunks and hand-over need. It equals
    transformers for all positions below max_position_embeddings and for decoding token by token beyond them, and
    differs for prompts that are longer than max_position_embeddings themselves.
    """
    positions = torch.arange(max_len, dtype=torch.float32)[:, None]
    attention_factor = 1.0
    scaling = config.rope_scaling
    if scaling is None:
        frequencies = _default(config.rope_theta, config.head_dim)
    elif scaling["rope_type"] == "linear":
        frequencies = _default(config.rope_theta, config.head_dim) / scaling["factor"]
    elif scaling["rope_type"] == "dynamic":
        frequencies = _dynamic(config, scaling["factor"], positions)
    elif scaling["rope_type"] == "llama3":
        frequencies = _llama3(_default(config.rope_theta, config.head_dim), scaling)
    elif scaling["rope_type"] == FREQUENCY_FACTORS:
        frequencies = _default(config.rope_theta, config.head_dim) / torch.tensor(scaling["factors"])
    else:
        frequencies = _yarn(config.rope_theta, config.head_dim, scaling)
        attention_factor = yarn_attention_factor(scaling)
    # float32 angles as transformers rounds them; float64 functions, whose vectorised and scalar variants, chosen by
    # the table's length, do not differ after rounding
    angles = (positions * frequencies).double()
    cos, sin = (angles.cos() * attention_factor).float(), (angles.sin() * attention_factor).float()
    return RotaryTable(cos.to(device), sin.to(device))


def yarn_attention_factor(scaling: dict[str, Any]) -> float:
    """YaRN's temperature on the attention logits, applied to queries and keys through cos and sin."""
    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])

    def mscale(weight: float) -> float:
        return 1.0 if scaling["factor"] <= 1 else 0.1 * weight * math.log(scaling["factor"]) + 1.0

    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return mscale(scaling["mscale"]) / mscale(scaling["mscale_all_dim"])
    return mscale(1.0)


def _default(theta: float, head_dim: int) -> torch.Tensor:
    """[head_dim / 2] inverse frequencies."""
    return 1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))


def _dynamic(config: ModelConfig, factor: float, positions: torch.Tensor) -> torch.Tensor:
    """[max_len, head_dim / 2]: one row of frequencies for each sequence length."""
    dim, max_positions = config.head_dim, config.max_position_embeddings
    lengths = (positions.double() + 1).clamp(min=max_positions)
    base = config.rope_theta * (factor * lengths / max_positions - (factor - 1)) ** (dim / (dim - 2))
    return (1.0 / (base ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim))).float()


def _llama3(frequencies: torch.Tensor, scaling: dict[str, Any]) -> torch.Tensor:
    """Long wavelengths divided by the factor, short ones kept, the ones between interpolated."""
    original = scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    wavelengths = 2 * math.pi / frequencies
    smooth = (original / wavelengths - low) / (high - low)
    between = (1 - smooth) * frequencies / scaling["factor"] + smooth * frequencies
    result = torch.where(wavelengths > original / low, frequencies / scaling["factor"], between)
    return torch.where(wavelengths < original / high, frequencies, result)


def _yarn(theta: float, dim: int, scaling: dict[str, Any]) -> torch.Tensor:
    """Interpolation of slow dimensions, extrapolation of fast ones, a linear ramp between (section 3.2)."""
    original = scaling["original_max_position_embeddings"]

    def dimension_of(rotations: float) -> float:
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension_of(scaling.get("beta_fast") or 32), dimension_of(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low or 0.001
    interpolated = ((torch.arange(dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    frequencies = _default(theta, dim)
    return frequencies / scaling["factor"] * interpolated + frequencies * (1 - interpolated)
