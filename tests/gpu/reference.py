"""What one engine of its own process says to the requests of shared_gpu.py, and what memory it takes: one line of JSON.

Usage: python reference.py CONFIG.json
"""

from __future__ import annotations

import json
import sys

import torch

from pdray.config import Config
from pdray.engine.build import build_engine
from pdray.engine.request import EngineRequest
from pdray.engine.step.profile import profile_model
from pdray.models import load_model
from pdray.sampling_params import SamplingParams

GPU = torch.device("cuda")
NUM_REQUESTS = 32
NUM_TOKENS = 48
KV_BYTES = 4 * 1024**3


def requests() -> tuple[list[list[int]], list[SamplingParams]]:
    """Prompts of 1 to 3,000 tokens, some of which begin alike; greedy and seeded, every fourth with two completions."""
    lengths = [1 + 613 * i % 3000 for i in range(NUM_REQUESTS)]
    prompts = [[(7 * (i % 5) * j + 31 * j * j) % 50_000 for j in range(length)] for i, length in enumerate(lengths)]
    params = [
        SamplingParams(temperature=i % 2, seed=i, n=1 + (i % 4 == 3), max_tokens=NUM_TOKENS, ignore_eos=True)
        for i in range(NUM_REQUESTS)
    ]
    return prompts, params


def main() -> None:
    config = Config(mode="colocated", kv_cache_memory_bytes=KV_BYTES, **json.loads(sys.argv[1]))
    model = load_model(config, GPU)
    weights = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    profile_model(config.for_device("cuda"), model.decoder)
    activations = torch.cuda.max_memory_allocated() - weights
    torch.cuda.empty_cache()
    engine = build_engine(config, model, GPU)
    prompts, params = requests()
    said: list[list[list[int]]] = [[[] for _ in range(each.n)] for each in params]
    for key, (prompt, each) in enumerate(zip(prompts, params, strict=True)):
        engine.add(EngineRequest(key, prompt, each, indices=tuple(range(each.n))))
    while engine.has_work():
        for update in engine.step():
            assert isinstance(update.key, int) and update.failure is None, update
            for token in update.tokens:
                said[update.key][token.index].append(token.token_id)
    print(json.dumps({"weights": weights, "activations": activations, "said": said}))


if __name__ == "__main__":
    main()
