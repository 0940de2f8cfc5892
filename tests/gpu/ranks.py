"""Two processes that share a model in float32, with graphs, against one that has all of it.

With one GPU both are on it, and NCCL takes them for two hosts: slow, and the same calls.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from models import FLOAT32_TOLERANCE, GPU, SHAPES, build, engine, engine_conftest
from rows import Row

import pdray.ranks.leader
from pdray.models import load_model
from pdray.ranks.engine import end_process
from pdray.ranks.leader import Leader
from pdray.ranks.member import member_environment
from pdray.ranks.pools import RankPools
from pdray.sampling_params import SamplingParams
from pdray.testing.every_draw import EVERY_DRAW, requests_of
from pdray.testing.one_gpu import one_gpu_environment

DRAWS = EVERY_DRAW | {"scores": SamplingParams(temperature=0, max_tokens=5, ignore_eos=True, prompt_logprobs=2)}
DIVISIBLE = ("Qwen3 16/8 d128", "Qwen2 14/2 d64", "Llama 8/1 d96")
SETTINGS: dict[str, Any] = {"mode": "colocated", "max_num_seqs": 16, "seed": 0}


def share_one_gpu() -> None:
    """Let the ranks of this process's leaders be on its only GPU."""
    os.environ |= one_gpu_environment("rank-0")
    pdray.ranks.leader.visible_gpus = lambda: ["0", "0"]
    pdray.ranks.leader.member_environment = lambda gpus: member_environment(gpus[:1]) | one_gpu_environment("rank-1")


def check_ranks(names: tuple[str, ...] = DIVISIBLE) -> Iterator[Row]:
    """Tokens of every kind of draw, and the logits behind them, in chunks and in graphs."""
    how = "two GPUs"
    if torch.cuda.device_count() < 2:
        share_one_gpu()
        how = "one GPU"
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            build(*SHAPES[name], Path(folder))
            torch.cuda.empty_cache()
            alone = engine(Path(folder), "float32", **SETTINGS).run(*requests_of(DRAWS))
            config = alone.config.model_copy(update={"tensor_parallel_size": 2, "mode": "disaggregated"})
            with Leader(config, GPU, end_process) as leader:
                model = load_model(config, GPU, group=leader.group)
                pair = engine_conftest.RecordingEngine(config, model, GPU, ranks=leader.ranks)
                pair.run(*requests_of(DRAWS))
                yield from compare(f"two ranks, {name}, {how}", pair, alone)
                yield blocks_of_all_ranks(f"two ranks, {name}, {how}", leader.open_pools(pair.pool, model.config), pair)
            del pair, alone, model


def blocks_of_all_ranks(name: str, pools: RankPools, pair: Any) -> Row:
    """What a channel writes into the pools of all ranks it reads from them again, in pieces; each has its own heads."""
    layout, model = pair.pool.layout, pair.model.config
    layers, ids = range(1, layout.num_layers), list(range(pair.num_blocks - 1, 0, -3))
    shape = len(layers), len(ids), 2, layout.block_size, model.num_kv_heads, layout.head_dim
    data = torch.randn(shape, dtype=layout.dtype)
    pools.write(layers, ids, data)
    ready = torch.cuda.Event()
    ready.record()
    same = torch.equal(pools.read(layers, ids, ready), data)
    own = pair.pool.tensor[1:, ids].cpu()
    same = same and torch.equal(own, data[..., : layout.num_kv_heads, :])
    return Row(f"{name}: {len(ids)} blocks in and out", "equal" if same else "other bytes", "equal", same)


def ids(engine: Any, key: str) -> dict[int, list[int]]:
    """Of each completion; log-probabilities of float32 sums in another order differ in their last bits."""
    return {index: [token.token_id for token in tokens] for index, tokens in engine.tokens[key].items()}


def compare(name: str, pair: Any, alone: Any) -> Iterator[Row]:
    differing = [key for key in DRAWS if ids(pair, key) != ids(alone, key)]
    yield Row(f"{name}: answers that differ", f"{len(differing)} of {len(DRAWS)} {differing}", "0", not differing)
    error = max(float((pair.logits[at] - logits).abs().max()) for at, logits in alone.logits.items())
    yield Row(f"{name}: logits, float32", f"{error:.1e}", f"{FLOAT32_TOLERANCE:.0e}", error < FLOAT32_TOLERANCE)
    scores = [
        torch.tensor(
            [
                each.logprob
                for update in engine.updates["scores"]
                if update.prompt_scores is not None
                for row in update.prompt_scores.unpack()
                for each in row.values()
            ]
        )
        for engine in (pair, alone)
    ]
    error = float((scores[0] - scores[1]).abs().max())
    yield Row(f"{name}: prompt's logprobs", f"{error:.1e}", f"{FLOAT32_TOLERANCE:.0e}", error < FLOAT32_TOLERANCE)
