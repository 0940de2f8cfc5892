"""The engine on a GPU against transformers on the same GPU and weights, and against itself in two halves."""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from rows import Row

from pdray.config import Config
from pdray.engine.request import EngineRequest
from pdray.models import load_model
from pdray.sampling_params import SamplingParams

_spec = importlib.util.spec_from_file_location("engine_conftest", Path(__file__).parents[1] / "engine" / "conftest.py")
assert _spec is not None and _spec.loader is not None
engine_conftest = sys.modules["engine_conftest"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(engine_conftest)

GPU = torch.device("cuda")
FLOAT32_TOLERANCE = 1e-3
BFLOAT16_FACTOR = 1.5  # of the error that transformers' own bfloat16 makes
SIZES = {"vocab_size": 1024, "intermediate_size": 512, "num_hidden_layers": 4, "max_position_embeddings": 2048}
# Query heads, KV heads, head size: those of SmolLM2, Qwen3-0.6B, a group of 7 and the odd sizes.
SHAPES = {
    "Llama 9/3 d64": ("Llama", 9, 3, 64),
    "Qwen3 16/8 d128": ("Qwen3", 16, 8, 128),
    "Qwen2 14/2 d64": ("Qwen2", 14, 2, 64),
    "Qwen3 4/4 d80": ("Qwen3", 4, 4, 80),
    "Llama 8/1 d96": ("Llama", 8, 1, 96),
}
PROMPT_LENGTHS = (1, 16, 75, 333, 700)
NUM_OUTPUTS = 40


def build(family: str, num_heads: int, num_kv_heads: int, head_dim: int, folder: Path) -> Any:
    """A random transformers model in float32, on the GPU and in the folder."""
    heads = {"num_attention_heads": num_heads, "num_key_value_heads": num_kv_heads, "head_dim": head_dim}
    config = getattr(transformers, f"{family}Config")(**SIZES, **heads, hidden_size=num_heads * head_dim)
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.1 if "norm" in name else 0.03, generator=generator)
    model.save_pretrained(folder)
    return model.to(GPU)


def requests(seed: int = 0) -> list[EngineRequest]:
    generator = torch.Generator().manual_seed(seed)
    params = SamplingParams(temperature=0, max_tokens=NUM_OUTPUTS, ignore_eos=True)
    return [
        EngineRequest(number, torch.randint(5, 1024, (length,), generator=generator).tolist(), params)
        for number, length in enumerate(PROMPT_LENGTHS)
    ]


def engine(folder: Path, dtype: str, **settings: Any) -> Any:
    base = {"max_num_seqs": 8, "max_num_batched_tokens": 128, "num_kv_blocks": 200, "transfer_layer_group": 2}
    config = Config(model=str(folder), dtype=dtype, device="cuda", skip_tokenizer_init=True, **base | settings)
    return engine_conftest.RecordingEngine(config, load_model(config, GPU), GPU)


@torch.inference_mode()
def reference(model: Any, recorded: Any, request: EngineRequest) -> torch.Tensor:
    """transformers' logits after the prompt and after each of our tokens: teacher-forced."""
    ids = torch.tensor([request.prompt_token_ids + recorded.ids(request.key)[:-1]], device=GPU)
    logits: torch.Tensor = model(ids, use_cache=False).logits[0, len(request.prompt_token_ids) - 1 :].float()
    return logits


def ours(recorded: Any, request: EngineRequest) -> torch.Tensor:
    return torch.stack([recorded.logits[request.key, 0, position] for position in range(NUM_OUTPUTS)]).float()


def check_models() -> Iterator[Row]:
    """Chunked prefill and decode of mixed lengths in one batch; a pool too small, so that sequences are preempted."""
    torch.backends.cuda.matmul.allow_tf32 = False
    for name, shape in SHAPES.items():
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            model = build(*shape, folder)
            full = engine(folder, "float32").run(*requests())
            expected = [reference(model, full, request) for request in requests()]
            errors = [(ours(full, r) - e).abs().max().item() for r, e in zip(requests(), expected, strict=True)]
            yield Row(f"{name} float32", f"{max(errors):.1e}", f"<= {FLOAT32_TOLERANCE:g}", max(errors) <= 1e-3)
            # with a budget that adapts to streams, prompts may wait until the pool is large enough
            tight = engine(folder, "float32", num_kv_blocks=78, target_tpot_ms=0).run(*requests())
            same = all(tight.ids(r.key) == full.ids(r.key) for r in requests())
            preempted = tight.stats().num_preemptions
            yield Row(
                f"{name} small pool", f"{preempted} preempted, same {same}", "some, same tokens", same and preempted > 0
            )
            yield disaggregated(name, folder, full)
            half = engine(folder, "bfloat16").run(*requests())
            right = [reference(model, half, request) for request in requests()]
            theirs = [reference(model.to(torch.bfloat16), half, request) for request in requests()]
            error = sum((ours(half, r) - e).norm().item() for r, e in zip(requests(), right, strict=True))
            allowed = BFLOAT16_FACTOR * sum((t - e).norm().item() for t, e in zip(theirs, right, strict=True))
            yield Row(f"{name} bfloat16", f"error {error:.2f}", f"<= {allowed:.2f}", error <= allowed)


def disaggregated(name: str, folder: Path, whole: Any) -> Row:
    """A prefill engine that fills a decode engine's blocks, both on this GPU."""
    pair = engine_conftest.Disaggregated(engine(folder, "float32"), engine(folder, "float32"))
    decode = pair.run(*requests())
    same = [decode.ids(request.key) == whole.ids(request.key) for request in requests()]
    return Row(f"{name} in two engines", f"{sum(same)} of {len(same)} the same", "all", all(same))
