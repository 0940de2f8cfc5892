"""The most expensive forward pass that the configuration allows, to measure what it leaves for the KV pool."""

from __future__ import annotations

import torch

from pdray.config import Config
from pdray.engine.kv.layout import KVLayout
from pdray.engine.kv.pool import KVPool
from pdray.engine.step.histories import Histories
from pdray.engine.step.mask_buffer import MaskBuffer
from pdray.engine.step.warm_up import load_late_draws
from pdray.kernels.attention.flash import takes_heads
from pdray.kernels.attention.paged import AttentionMetadata
from pdray.kernels.crossover import FLASH_MAX_GATHERED_KEYS
from pdray.models.decoder import Decoder


@torch.inference_mode()
def profile_model(config: Config, decoder: Decoder) -> None:
    """Run max_num_batched_tokens tokens, and draw for max_num_seqs rows in every way, beside all that a lane keeps.

    All sequences lie in the same few blocks: the results mean nothing.
    """
    device, block_size = decoder.device, config.block_size
    length = min(config.max_num_batched_tokens, decoder.max_len)
    query_lens = [length] * (config.max_num_batched_tokens // length)
    if config.max_num_batched_tokens % length:
        query_lens.append(config.max_num_batched_tokens % length)
    num_blocks = -(-length // block_size)
    layout = KVLayout.of(decoder.config, block_size, decoder.dtype, decoder.num_ranks)
    pool = KVPool.allocate(layout, num_blocks, device)
    positions = torch.cat([torch.arange(n, device=device) for n in query_lens])
    starts = torch.tensor([0, *query_lens], device=device).cumsum(0).to(torch.int32)
    table = torch.arange(num_blocks, dtype=torch.int32, device=device)
    meta = AttentionMetadata(
        slot_mapping=positions,
        block_tables=table.expand(len(query_lens), -1).contiguous(),
        cu_seqlens_q=starts,
        seq_lens=torch.tensor(query_lens, dtype=torch.int32, device=device),
        query_lens=query_lens,
        kv_lens=query_lens,
        fresh_from=0,
    )
    draws = config.max_num_seqs, decoder.config.vocab_size, device
    histories, masks = Histories(*draws), MaskBuffer(*draws)
    logits = torch.empty(draws[:2], dtype=decoder.dtype, device=device)
    hidden = decoder.forward(torch.zeros_like(positions), positions, pool.tensor, meta)
    decoder.compute_logits(hidden[: len(logits)], logits[: len(hidden)])
    if takes_heads(device, decoder.dtype, decoder.config.head_dim):
        attend_behind_prefix(decoder, pool, block_size, config.max_num_batched_tokens)
    load_late_draws(histories.words, masks.words, decoder.dtype)


def attend_behind_prefix(decoder: Decoder, pool: KVPool, block_size: int, max_num_batched_tokens: int) -> None:
    """One layer's attention of the chunk whose keys take most memory where they are copied together."""
    device = decoder.device
    num_keys = min(decoder.max_len, FLASH_MAX_GATHERED_KEYS)
    num_tokens = min(max_num_batched_tokens, num_keys)
    num_blocks = pool.tensor.shape[1]
    table = torch.arange(-(-num_keys // block_size), dtype=torch.int32, device=device) % num_blocks
    positions = torch.arange(num_keys - num_tokens, num_keys, device=device)
    meta = AttentionMetadata(
        slot_mapping=positions % (num_blocks * block_size),
        block_tables=table[None],
        cu_seqlens_q=torch.tensor([0, num_tokens], dtype=torch.int32, device=device),
        seq_lens=torch.tensor([num_keys], dtype=torch.int32, device=device),
        query_lens=[num_tokens],
        kv_lens=[num_keys],
    )
    hidden = torch.zeros(num_tokens, decoder.config.hidden_size, dtype=decoder.dtype, device=device)
    decoder.layers[0].attend(hidden, positions, pool.tensor[0], meta)
