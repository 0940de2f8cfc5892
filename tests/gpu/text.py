"""The default model's weights on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from rows import Row

from pdray.config import Config
from pdray.engine.build import build_engine
from pdray.engine.request import EngineRequest
from pdray.errors import OutOfMemoryError
from pdray.models import load_model, load_tokenizer
from pdray.sampling_params import SamplingParams

GPU = torch.device("cuda")


def check_text(gguf: Path | None) -> Iterator[Row]:
    """SmolLM2 knows the capital of France."""
    if gguf is None:
        yield Row("SmolLM2", "no --gguf FILE given", "Paris", None)
        return
    for dtype in ("float32", "bfloat16"):
        config = Config(model=str(gguf), dtype=dtype, device="cuda", max_model_len=1024, gpu_memory_utilization=0.3)
        tokenizer = load_tokenizer(config)
        assert tokenizer is not None
        question = [{"role": "user", "content": "What is the capital of France?"}]
        prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=False)
        engine = build_engine(config, load_model(config, GPU), GPU)
        engine.add(EngineRequest("paris", prompt, SamplingParams(temperature=0, max_tokens=24)))
        ids = [token.token_id for _ in iter(engine.has_work, False) for u in engine.step() for token in u.tokens]
        text = tokenizer.decode(ids, skip_special_tokens=True).strip()
        yield Row(f"SmolLM2 {dtype}", f"{text!r}, {engine.num_blocks} blocks", "Paris", "Paris" in text)
        del engine
        torch.cuda.empty_cache()


def check_memory(gguf: Path | None) -> Iterator[Row]:
    """Too little memory is an error that says what was needed, what was free, and what to change."""
    if gguf is None:
        return
    config = Config(model=str(gguf), device="cuda", gpu_memory_utilization=0.005)
    try:
        build_engine(config, load_model(config, GPU), GPU)
    except OutOfMemoryError as error:
        text = str(error)
        ok = "gpu_memory_utilization" in text and "iB" in text
        yield Row("too little memory", text[:160], "needed, free, setting", ok)
    else:
        yield Row("too little memory", "no error", "an error", False)
