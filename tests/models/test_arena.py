"""Weights in one piece of memory: the same model in the same places, whoever builds it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pdray.config import Config
from pdray.models import load_model
from pdray.models.arena import ALIGNMENT, Arena
from pdray.models.decoder import Decoder, num_weight_bytes
from pdray.models.load import LoadedModel, WeightMemory
from pdray.models.model_config import ModelConfig
from pdray.testing.tiny_model import TINY_CONFIG

CPU = torch.device("cpu")
QWEN = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 20, "num_attention_heads": 5}
MODELS: dict[str, dict[str, Any]] = {
    "untied": {},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "head norms": QWEN | {"num_key_value_heads": 1},
}


def load(
    tmp_path: Path, changes: dict[str, Any], memory: WeightMemory | None = None, dtype: str = "auto"
) -> LoadedModel:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(TINY_CONFIG | changes))
    settings: dict[str, Any] = {"load_format": "dummy", "skip_tokenizer_init": True, "device": "cpu", "dtype": dtype}
    return load_model(Config(model=str(path), **settings), CPU, memory)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model", MODELS)
def test_a_model_in_an_arena_is_the_same_and_another_can_be_built_over_it(
    model: str, dtype: str, tmp_path: Path
) -> None:
    """The second one reads no weights: it finds them, and nothing of them is anywhere else."""
    alone = load(tmp_path, MODELS[model], dtype=dtype)
    taken: list[torch.Tensor] = []

    def take(num_bytes: int) -> torch.Tensor:
        taken.append(torch.zeros(num_bytes, dtype=torch.uint8))
        return taken[-1]

    first = load(tmp_path, MODELS[model], WeightMemory(take), dtype)
    second = load(tmp_path, MODELS[model], WeightMemory(lambda _: taken[0], is_filled=True), dtype)
    assert alone.fingerprint == first.fingerprint == second.fingerprint
    wanted = alone.decoder.parameters()
    for loaded in (first, second):
        found = loaded.decoder.parameters()
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    end = taken[0].data_ptr() + len(taken[0])
    norms = [name for name in wanted if name.endswith("norm.weight")]
    assert norms and all(taken[0].data_ptr() <= found[name].data_ptr() < end for name in norms)


@pytest.mark.parametrize("model", MODELS)
def test_an_arena_is_as_large_as_its_weights(model: str) -> None:
    """Each in a place of its own, on a boundary of its own, and none behind the end."""
    config = ModelConfig.from_hf(TINY_CONFIG | MODELS[model], None)
    size = num_weight_bytes(config, torch.float32)
    arena = Arena(torch.zeros(size, dtype=torch.uint8))
    decoder = Decoder(config, 64, torch.float32, CPU, arena)
    assert arena.num_bytes == size
    views = {tensor.data_ptr(): tensor for tensor in decoder.parameters().values()}
    assert sum(tensor.nbytes for tensor in views.values()) <= size
    assert size <= sum(-(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for tensor in views.values())
    with pytest.raises(AssertionError, match="has none for"):
        arena.take((1,), torch.float32)
