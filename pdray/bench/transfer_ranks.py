"""The two ends of a channel as workers of several ranks: with the processes, and an engine of a model of no use."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from pdray.background import SWITCH_INTERVAL_S
from pdray.bench.pool_spec import BLOCK_SIZE, PoolSpec
from pdray.bench.transfer_peers import ReceivingPeer, SendingPeer
from pdray.config import Config
from pdray.engine.build import PoolPlace, build_engine
from pdray.engine.kv.pool import KVPool
from pdray.models.load import load_model
from pdray.ranks.engine import end_process
from pdray.ranks.leader import Leader
from pdray.ranks.setup import RankSite
from pdray.transfer.channel import Site, WorkerRanks
from pdray.transfer.pool_blocks import WholeBlocks

MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 256,
    "vocab_size": 512,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "eos_token_id": 0,
}


def config_of(spec: PoolSpec, folder: Path) -> Config:
    """Of an engine whose ranks have such pools together."""
    heads = {"num_attention_heads": spec.num_heads, "num_key_value_heads": spec.num_heads, "head_dim": spec.head_dim}
    model = folder / "config.json"
    model.write_text(json.dumps(MODEL | heads | {"num_hidden_layers": spec.num_layers}))
    settings: dict[str, Any] = {
        "model": str(model),
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "device": spec.device,
        "dtype": "bfloat16",
        "tensor_parallel_size": spec.num_ranks,
        "num_kv_blocks": spec.num_blocks,
        "block_size": BLOCK_SIZE,
        "enforce_eager": True,
        "max_num_seqs": 2,
        "max_num_batched_tokens": 64,
        "worker_timeout_s": spec.timeout_s,
        "channel": spec.kind,
        "transfer_staging_bytes": spec.staging_bytes,
    }
    return Config(**settings)


class _Ranked:
    """What differs from a peer of one rank. If a rank ends, so does the process."""

    def _make_pool(self, site: Site) -> KVPool:
        sys.setswitchinterval(SWITCH_INTERVAL_S)  # other ranks are asked on threads of their own
        spec: PoolSpec = self.spec  # type: ignore[attr-defined]
        kind = self.kind  # type: ignore[attr-defined]
        peers = site.sends, site.num_peer_ranks
        others = RankSite(spec.name, site.num_peers, "", [kind.name], kind.spare_bytes, *peers)
        with tempfile.TemporaryDirectory() as folder:
            config = config_of(spec, Path(folder))
            self._leader = Leader(config, site.device, end_process, others)
            model = load_model(config, site.device, group=self._leader.group)
            place = PoolPlace(kind.spare_bytes)
            self._engine = build_engine(config, model, site.device, place, self._leader.ranks)
        pool = self._engine.pool
        self._blocks: WholeBlocks = self._leader.open_pools(pool, model.config)
        kind.attach_ranks(pool, WorkerRanks(self._blocks, spec.num_heads, list(self._leader.others)))
        self._layers, self._ids = range(spec.num_layers), list(range(spec.num_blocks))
        self._shape = spec.num_layers, spec.num_blocks, 2, BLOCK_SIZE, spec.num_heads, spec.head_dim
        self._store(torch.zeros(self._shape, dtype=torch.bfloat16))
        return pool

    def rank_pids(self) -> list[int]:
        """Processes of the other ranks."""
        return self._leader.pids

    def fill(self, seed: int) -> None:
        self._store(self._numbers(seed))

    def holds(self, seed: int, source: list[int], destination: list[int]) -> bool:
        expected = torch.zeros(self._shape, dtype=torch.bfloat16)
        expected[:, destination] = self._numbers(seed)[:, source]
        found = self._blocks.read(self._layers, self._ids)
        self._store(torch.zeros_like(expected))
        return torch.equal(found.view(torch.int16), expected.view(torch.int16))

    def _numbers(self, seed: int) -> torch.Tensor:
        """What _Peer.fill() makes of that seed."""
        device = self.pool.device  # type: ignore[attr-defined]
        generator, numbers = torch.Generator(device).manual_seed(seed), torch.empty(self._shape, dtype=torch.int16)
        for layer in numbers:
            layer.copy_(torch.empty_like(layer, device=device).random_(-(2**15), 2**15, generator=generator))
        return numbers.view(torch.bfloat16)

    def _store(self, data: torch.Tensor) -> None:
        self._blocks.write(self._layers, self._ids, data)

    def _close_ranks(self) -> None:
        self._engine.close()
        self._leader.close()


class RankedSendingPeer(_Ranked, SendingPeer):
    """A SendingPeer of several ranks."""

    async def close(self) -> None:
        await super().close()
        self._close_ranks()


class RankedReceivingPeer(_Ranked, ReceivingPeer):
    """A ReceivingPeer of several ranks."""

    async def close(self) -> None:
        await super().close()
        self._close_ranks()


def sending_peer(spec: PoolSpec) -> SendingPeer:
    """Of as many ranks as the spec says."""
    return SendingPeer(spec) if spec.num_ranks == 1 else RankedSendingPeer(spec)


def receiving_peer(spec: PoolSpec) -> ReceivingPeer:
    """Of as many ranks as the spec says."""
    return ReceivingPeer(spec) if spec.num_ranks == 1 else RankedReceivingPeer(spec)
