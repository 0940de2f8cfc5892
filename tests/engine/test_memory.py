"""The size of the KV pool."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pdray.config import Config
from pdray.engine.kv import sizing
from pdray.engine.kv.layout import KVLayout
from pdray.engine.kv.pool import KVPool
from pdray.engine.kv.sizing import GpuRoom, available_host_bytes, choose_num_blocks
from pdray.engine.step import profile
from pdray.engine.step.profile import profile_model
from pdray.errors import ConfigError, OutOfMemoryError
from pdray.kernels.attention.paged import AttentionMetadata

CPU = torch.device("cpu")
BLOCK = 2 * 3 * 16 * 2 * 8 * 4  # keys and values, layers, tokens, heads, head_dim, bytes


def choose(llama: Any, **settings: Any) -> int:
    config = Config(model=str(llama.folder), skip_tokenizer_init=True, **{"max_num_seqs": 4, **settings})
    return choose_num_blocks(config, KVLayout.of(llama.loaded.config, 16, torch.float32), CPU, 512)


def test_a_block_and_the_pool(llama: Any) -> None:
    assert KVLayout.of(llama.loaded.config, 16, torch.float32).block_bytes == BLOCK
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        pool = KVPool.allocate(KVLayout.of(llama.loaded.config, 16, dtype), 5, CPU).tensor
        assert pool.shape == (3, 5, 2, 16, 2, 8) and pool.dtype == dtype and pool.is_contiguous()
        assert not pool.any()


def test_num_kv_blocks_overrides_all(llama: Any) -> None:
    assert choose(llama, num_kv_blocks=7, kv_cache_memory_bytes=10**9) == 7
    with pytest.raises(ConfigError, match="num_kv_blocks is 1.*at least 2"):
        choose(llama, num_kv_blocks=1)


def test_kv_cache_memory_bytes(llama: Any) -> None:
    assert choose(llama, kv_cache_memory_bytes=100 * BLOCK + 5) == 100
    assert choose(llama, kv_cache_memory_bytes=10**9) == 4 * 32 + 1, "no more than max_num_seqs can fill"
    with pytest.raises(
        OutOfMemoryError, match="one 512-token sequence.*on cpu.*kv_cache_memory_bytes is 202751.*raise"
    ):
        choose(llama, kv_cache_memory_bytes=33 * BLOCK - 1)


def test_a_share_of_the_free_host_memory(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizing, "available_host_bytes", lambda: 1000 * BLOCK)
    assert choose(llama, cpu_memory_utilization=0.05) == 50
    with pytest.raises(OutOfMemoryError, match="lower max_model_len to 464 or less, or raise cpu_memory_utilization$"):
        choose(llama, cpu_memory_utilization=0.03)


def test_a_containers_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit, usage = tmp_path / "max", tmp_path / "current"
    monkeypatch.setattr(sizing, "CGROUP_FILES", ((str(limit), str(usage)),))
    free = available_host_bytes()
    assert free > 10**7
    limit.write_text("5000000\n")
    usage.write_text("1000000\n")
    assert available_host_bytes() == 4000000
    limit.write_text("max\n")
    assert available_host_bytes() > 10**7


def test_the_profile_run_fits_any_token_budget(llama: Any) -> None:
    for budget in (8, 512, 700):
        profile_model(Config(max_num_seqs=8, max_num_batched_tokens=budget), llama.loaded.decoder)


def test_the_profile_run_copies_as_many_keys_together_as_a_step_may(
    llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where FlashAttention takes the model's heads, a chunk behind a long prefix needs memory for its keys."""
    metas: list[AttentionMetadata] = []
    layer = llama.loaded.decoder.layers[0]
    attend = layer.attend

    def watched(
        hidden: torch.Tensor, positions: torch.Tensor, kv: torch.Tensor, meta: AttentionMetadata, *rest: Any
    ) -> Any:
        metas.append(meta)
        return attend(hidden, positions, kv, meta, *rest)

    monkeypatch.setattr(layer, "attend", watched)
    monkeypatch.setattr(profile, "takes_heads", lambda *_: True)
    monkeypatch.setattr(profile, "FLASH_MAX_GATHERED_KEYS", 200)
    profile_model(Config(max_num_seqs=8, max_num_batched_tokens=64), llama.loaded.decoder)
    assert (metas[-1].query_lens, metas[-1].kv_lens) == ([64], [200]) and len(metas) == 2


def test_a_lender_leaves_memory_to_its_guests(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights outside torch count, a guest's activations and context are left, and its share is the lender's."""
    gib = 1024**3
    numbers = {"max_memory_allocated": 12 * gib, "memory_allocated": 8 * gib, "mem_get_info": (50 * gib, 80 * gib)}
    for name in ("empty_cache", "reset_peak_memory_stats", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    for name, value in numbers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    config = Config(model=str(llama.folder), skip_tokenizer_init=True, gpu_memory_utilization=0.75, max_num_seqs=2000)

    def num_bytes(room: GpuRoom) -> int:
        layout = KVLayout.of(llama.loaded.config, 16, torch.float32)
        return choose_num_blocks(config, layout, torch.device("cuda"), 10**5, room=room) * layout.block_bytes

    assert num_bytes(GpuRoom(0.5)) // BLOCK == 18 * gib // BLOCK  # 30 less the peak of 12
    assert num_bytes(GpuRoom(1.0)) // BLOCK == 46 * gib // BLOCK  # what is free now, less 4 of activations
    assert num_bytes(GpuRoom(0.5, 3 * gib)) // BLOCK == 15 * gib // BLOCK
    assert num_bytes(GpuRoom(0.8, 3 * gib, 2)) // BLOCK == (33 - 2 * 9) * gib // BLOCK
