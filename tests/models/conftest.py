"""Tiny random transformers models, and our decoder with the same weights over a paged pool."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

from pdray.kernels.attention.paged import AttentionMetadata
from pdray.models.decoder import Decoder
from pdray.models.model_config import ModelConfig

BLOCK_SIZE = 16
TINY = {
    "vocab_size": 211,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


class PagedSequence:
    """One sequence of a decoder with a KV pool of its own; its blocks are shuffled."""

    def __init__(self, decoder: Decoder, num_blocks: int = 24) -> None:
        config = decoder.config
        shape = (config.num_layers, num_blocks, 2, BLOCK_SIZE, decoder.shard.kv_heads.size, config.head_dim)
        self.decoder = decoder
        self.kv = torch.full(shape, 7.0, dtype=decoder.dtype)  # stale values must not show
        self.block_table = torch.randperm(num_blocks - 1, generator=torch.Generator().manual_seed(0)) + 1
        self.length = 0

    @torch.inference_mode()
    def run(
        self,
        token_ids: list[int],
        on_layer: Callable[[int], None] | None = None,
        rows: list[int] | None = None,
    ) -> torch.Tensor:
        """Append tokens; logits [len(token_ids), vocab_size] float32, or of ``rows`` alone."""
        start, end = self.length, self.length + len(token_ids)
        positions = torch.arange(start, end)
        slots = self.block_table[positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
        meta = AttentionMetadata(
            slot_mapping=slots,
            block_tables=self.block_table[None].to(torch.int32),
            cu_seqlens_q=torch.tensor([0, end - start], dtype=torch.int32),
            seq_lens=torch.tensor([end], dtype=torch.int32),
            query_lens=[end - start],
            kv_lens=[end],
        )
        self.length = end
        wanted = None if rows is None else torch.tensor(rows, dtype=torch.int64)
        hidden = self.decoder.forward(torch.tensor(token_ids), positions, self.kv, meta, on_layer, rows=wanted)
        return self.decoder.compute_logits(hidden)


def build_hf_model(architecture: str, **overrides: Any) -> Any:
    """A tiny transformers model in float32 whose every parameter, norms and biases too, is random."""
    config_class = getattr(transformers, architecture.replace("ForCausalLM", "Config"))
    config = config_class(architectures=[architecture], **{**TINY, **overrides})
    model = getattr(transformers, architecture)(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.2, generator=generator)
    return model


def build_decoder(hf_model: Any, max_len: int | None = None) -> Decoder:
    """Our decoder with a transformers model's weights, packed as load_model packs them."""
    config = ModelConfig.from_hf(hf_model.config.to_dict())
    decoder = Decoder(config, max_len or config.max_model_len, torch.float32, torch.device("cpu"))
    state = hf_model.state_dict()
    for name, parameter in decoder.parameters().items():
        parameter.copy_(state[name])
    decoder.pack_weights()
    return decoder


def random_tokens(count: int, vocab_size: int = 211) -> list[int]:
    return torch.randint(vocab_size, (count,), generator=torch.Generator().manual_seed(count)).tolist()


@torch.inference_mode()
def hf_logits(hf_model: Any, token_ids: list[int]) -> torch.Tensor:
    """[len(token_ids), vocab_size]."""
    logits: torch.Tensor = hf_model(torch.tensor([token_ids])).logits[0]
    return logits


@pytest.fixture
def hf_model() -> Callable[..., Any]:
    return build_hf_model


@pytest.fixture
def decoder_of() -> Callable[..., Decoder]:
    return build_decoder


@pytest.fixture
def paged() -> type[PagedSequence]:
    return PagedSequence


@pytest.fixture
def tokens() -> Callable[..., list[int]]:
    return random_tokens


@pytest.fixture
def reference_logits() -> Callable[[Any, list[int]], torch.Tensor]:
    return hf_logits
