"""The operations that a step consists of, at a model's shapes, with what each must at least read, write and compute.

A case holds several calls of one operation over different weights or KV, so that no cache helps from call to call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pdray.engine.kv.layout import KVLayout
from pdray.kernels.attention.paged import AttentionMetadata, find_fresh, paged_attention
from pdray.kernels.attention.rotary_store import rotate_and_store
from pdray.kernels.elementwise.activation import silu_and_mul
from pdray.kernels.elementwise.embedding import embed
from pdray.kernels.elementwise.rms_norm import rms_norm
from pdray.kernels.kv.pack import PackedBlocks, pack_blocks, unpack_blocks
from pdray.kernels.linear.linear import linear, pack_weight
from pdray.kernels.linear.norm_linear import norm_linear
from pdray.kernels.sampling.draw_rows import draw_late, draw_tokens, report
from pdray.kernels.sampling.history import no_history
from pdray.kernels.sampling.mask import num_mask_words
from pdray.kernels.sampling.rows import WORDS, DrawTable, make_record
from pdray.models.decoder import shapes_of_layer
from pdray.models.model_config import ModelConfig
from pdray.models.rope import build_rotary_table
from pdray.sampling_params import MAX_LOGPROBS, SamplingParams

EPS = 1e-6
MAX_CALLS = 32
DRAW_FILTERS: dict[str, dict[str, float]] = {
    "top_k, top_p": {"top_k": 20, "top_p": 0.95},
    "min_p": {"min_p": 0.05},
    "top_p": {"top_p": 0.9},
}

Call = Callable[[], object]


class Case(NamedTuple):
    """Attributes:
    shape: for the table. calls: of the operation, each over other data.
    num_bytes, operations: the least of one call.
    """

    shape: str
    calls: Sequence[Call]
    num_bytes: float
    operations: float = 0.0


class Lengths(NamedTuple):
    """Sequences of an attention call. name: for the table."""

    name: str
    query_lens: list[int]
    kv_lens: list[int]

    @classmethod
    def decodes(cls, batch: int, kv_len: int) -> Lengths:
        return cls(f"decode {batch} x {kv_len:,}", [1] * batch, [kv_len] * batch)


class KernelCases:
    """Makes the cases of one model on one device.

    Args:
        batch_sizes: rows of what a decode step computes.
        working_set: bytes that the calls of a case should at least read together: more than the device's caches hold.
    """

    def __init__(
        self, model: ModelConfig, dtype: torch.dtype, device: torch.device, batch_sizes: list[int], working_set: float
    ) -> None:
        self.model = model
        self.dtype = dtype
        self.device = device
        self.batch_sizes = batch_sizes
        self.working_set = working_set
        self.block_size = 16
        self.max_len = model.max_position_embeddings

    def kinds(self) -> dict[str, Callable[[], Iterator[Case]]]:
        """Every operation by name."""
        qkv, o, gate_up, down = (tuple(part.weight.shape) for part in shapes_of_layer(self.model).linears())
        return {
            "qkv": lambda: self._products(*qkv, normed=True),
            "o": lambda: self._products(*o, added=True),
            "gate_up": lambda: self._products(*gate_up, normed=True, gated=True),
            "down": lambda: self._products(*down, added=True),
            "lm_head": lambda: self._products(self.model.vocab_size, self.model.hidden_size),
            "norm": self._norms,
            "rotary": self._rotaries,
            "activation": self._activations,
            "embedding": self._embeddings,
            "attention": self._attentions,
            "draw": self._draws,
            "pack": self._packs,
        }

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device).mul_(0.02).to(self.dtype)

    def _num_calls(self, num_bytes: float) -> int:
        return max(1, min(MAX_CALLS, round(self.working_set / num_bytes)))

    def _size(self, *tensors: Tensor) -> float:
        return float(sum(tensor.numel() * tensor.element_size() for tensor in tensors))

    def _products(
        self, n: int, k: int, *, normed: bool = False, gated: bool = False, added: bool = False
    ) -> Iterator[Case]:
        norm = self._random(k)
        num_weights = self._num_calls(n * k * self.dtype.itemsize)
        weights = [pack_weight(self._random(n, k)) for _ in range(num_weights)]
        for rows in self.batch_sizes:
            x, residual = self._random(rows, k), self._random(rows, n) if added else None
            if normed:
                calls = [partial(norm_linear, x, norm, EPS, w, gated=gated) for w in weights]
            else:
                calls = [partial(linear, x, w, residual=residual) for w in weights]
            out = rows * (n // 2 if gated else n) * (2 if added else 1) * self.dtype.itemsize
            num_bytes = n * k * self.dtype.itemsize + self._size(x) + out
            yield Case(f"{rows} x {k:,} to {n:,}", calls, num_bytes, 2.0 * rows * n * k)

    def _per_token(self, width: int, make: Callable[[int], tuple[Call, float]]) -> Iterator[Case]:
        """Cases for each batch size and one long prompt. make: number of tokens -> a call and its bytes."""
        for num_tokens in (*self.batch_sizes, min(16384, self.max_len)):
            num_calls = self._num_calls(make(num_tokens)[1])
            made = [make(num_tokens) for _ in range(num_calls)]
            yield Case(f"{num_tokens:,} x {width:,}", [call for call, _ in made], made[0][1])

    def _norms(self) -> Iterator[Case]:
        width = self.model.hidden_size
        weight = self._random(width)

        def make(num_tokens: int) -> tuple[Call, float]:
            x = self._random(num_tokens, width)
            return partial(rms_norm, x, weight, EPS), 2 * self._size(x)

        return self._per_token(width, make)

    def _activations(self) -> Iterator[Case]:
        width = self.model.intermediate_size

        def make(num_tokens: int) -> tuple[Call, float]:
            x = self._random(num_tokens, 2 * width)
            return partial(silu_and_mul, x), 1.5 * self._size(x)

        return self._per_token(width, make)

    def _embeddings(self) -> Iterator[Case]:
        width = self.model.hidden_size
        table = self._random(self.model.vocab_size, width)
        sampled = torch.zeros(1, dtype=torch.int64, device=self.device)

        def make(num_tokens: int) -> tuple[Call, float]:
            ids = torch.randint(self.model.vocab_size, (num_tokens,), device=self.device)
            return partial(embed, ids, table, sampled), 2.0 * num_tokens * width * self.dtype.itemsize

        return self._per_token(width, make)

    def _rotaries(self) -> Iterator[Case]:
        model = self.model
        heads = model.num_heads + 2 * model.num_kv_heads
        cos, sin = build_rotary_table(model, self.max_len, self.device)
        q_norm, k_norm = (self._random(model.head_dim) if model.qk_norm else None for _ in range(2))

        def make(num_tokens: int) -> tuple[Call, float]:
            qkv = self._random(num_tokens, heads * model.head_dim)
            kv_layer = self._pool(1, -(-num_tokens // self.block_size) + 1)[0]
            positions = torch.arange(num_tokens, device=self.device) % self.max_len
            slots = torch.randperm(kv_layer.shape[0] * self.block_size, device=self.device)[:num_tokens]
            kv_share = 2 * model.num_kv_heads / heads
            rotated = (model.num_heads + model.num_kv_heads) / heads
            table = cos, sin, positions
            call = partial(rotate_and_store, qkv, q_norm, k_norm, EPS, *table, kv_layer, slots, model.num_heads)
            return call, (1 + rotated + kv_share) * self._size(qkv)

        return self._per_token(heads * model.head_dim, make)

    def _pool(self, num_layers: int, num_blocks: int) -> Tensor:
        layout = KVLayout.of(self.model, self.block_size, self.dtype)
        return torch.randn((num_layers, num_blocks, *layout.block_shape), device=self.device, dtype=torch.float32).to(
            self.dtype
        )

    def _attentions(self) -> Iterator[Case]:
        long = min(32768, self.max_len)
        mixed = [100 + 1900 * i // 255 for i in range(256)]
        wanted = [
            Lengths.decodes(1, 600),
            Lengths.decodes(1, long),
            *(Lengths.decodes(batch, 640) for batch in (16, 64, 256)),
            Lengths("decode 256 x 100 to 2,000", [1] * 256, mixed[::-1]),
            Lengths("prompts 8 x 2,048", [2048] * 8, [2048] * 8),
            Lengths(f"prompt 1 x {long // 2:,}", [long // 2], [long // 2]),
            Lengths("2,048 after 8,192", [2048], [10240]),
        ]
        for lengths in wanted:
            if max(lengths.kv_lens) <= self.max_len:
                yield self._attention(lengths)

    def _attention(self, lengths: Lengths) -> Case:
        model = self.model
        name, query_lens, kv_lens = lengths
        num_blocks = [-(-n // self.block_size) for n in kv_lens]
        tables = torch.zeros(len(kv_lens), max(num_blocks), dtype=torch.int32)
        free = (torch.randperm(sum(num_blocks)) + 1).to(torch.int32)
        at = 0
        for row, count in enumerate(num_blocks):
            tables[row, :count] = free[at : at + count]
            at += count
        is_decode = max(query_lens) == 1
        num_decodes = len(query_lens) if is_decode else 0
        meta = AttentionMetadata(
            slot_mapping=torch.zeros(sum(query_lens), dtype=torch.int64, device=self.device),
            block_tables=tables.to(self.device),
            cu_seqlens_q=torch.tensor([0, *query_lens]).cumsum(0).to(torch.int32).to(self.device),
            seq_lens=torch.tensor(kv_lens, dtype=torch.int32, device=self.device),
            query_lens=query_lens,
            kv_lens=kv_lens,
            num_decodes=num_decodes,
            fresh_from=find_fresh(query_lens, kv_lens, num_decodes),
        )
        kv_bytes = 2.0 * sum(kv_lens) * model.num_kv_heads * model.head_dim * self.dtype.itemsize
        kv = self._pool(self._num_calls(kv_bytes), sum(num_blocks) + 1)
        heads = self._random(sum(query_lens), model.num_heads + 2 * model.num_kv_heads, model.head_dim)
        q, k, v = heads.split((model.num_heads, model.num_kv_heads, model.num_kv_heads), dim=1)
        scale = model.head_dim**-0.5
        calls = [partial(paged_attention, q, layer, meta, scale, k, v) for layer in kv]
        pairs = sum(n * kv_len - n * (n - 1) / 2 for n, kv_len in zip(query_lens, kv_lens, strict=True))
        operations = 4.0 * pairs * model.num_heads * model.head_dim
        return Case(name, calls, kv_bytes + 2 * self._size(q), operations)

    def _draws(self) -> Iterator[Case]:
        vocab_size = self.model.vocab_size
        for rows in self.batch_sizes:
            num_calls = self._num_calls(rows * vocab_size * self.dtype.itemsize)
            logits = [self._random(rows, vocab_size).mul_(100) for _ in range(num_calls)]
            out = torch.empty(rows, dtype=torch.int64, device=self.device)
            size = self._size(logits[0])
            plain = self._draw_table(rows, temperature=0.6)
            yield Case(f"{rows} x {vocab_size:,}", [partial(draw_tokens, x, plain, out) for x in logits], size)
            penalty = self._draw_table(rows, temperature=0.6, presence_penalty=0.5)
            calls = [partial(draw_tokens, x, penalty, out) for x in logits]
            yield Case(f"{rows} x {vocab_size:,}, penalty", calls, size + self._size(penalty.history))
            for name, filters in DRAW_FILTERS.items():
                table = self._draw_table(rows, temperature=0.6, **filters)
                calls = [partial(draw_late, x, table, out, may_need_search=name != "min_p") for x in logits]
                yield Case(f"{rows} x {vocab_size:,}, {name}", calls, size)
            asking = self._draw_table(rows, temperature=0.6, logprobs=5)
            reports = [partial(report, x, asking, out.zero_(), MAX_LOGPROBS) for x in logits]
            yield Case(f"{rows} x {vocab_size:,}, 5 logprobs", reports, size)

    def _draw_table(self, rows: int, **params: Any) -> DrawTable:
        """Rows of one kind, each with a slot of its own."""
        records = [make_record(SamplingParams(**params), i, slot=i) for i in range(rows)]
        words = torch.from_numpy(np.concatenate(records).view(np.int32).reshape(-1, WORDS))
        vocab_size = self.model.vocab_size
        history = no_history(rows, vocab_size, self.device)
        masks = torch.zeros(1, num_mask_words(vocab_size), dtype=torch.int32, device=self.device)
        return DrawTable(words.to(self.device), history, masks)

    def _packs(self) -> Iterator[Case]:
        num_layers, num_blocks = min(4, self.model.num_layers), min(512, self.max_len // self.block_size)
        kv = self._pool(num_layers, 4 * num_blocks)
        out = torch.empty(num_layers * num_blocks * kv.stride(1), dtype=self.dtype, device=self.device)
        ids = [torch.randperm(4 * num_blocks, device=self.device)[:num_blocks] for _ in range(MAX_CALLS)]
        layers = range(num_layers)
        for name, operation in (("pack", pack_blocks), ("unpack", unpack_blocks)):
            calls = [partial(operation, kv, layers, PackedBlocks(out, 0, i, 0, num_blocks)) for i in ids]
            yield Case(f"{name} {num_blocks} blocks of {num_layers} layers", calls, 2 * self._size(out))
