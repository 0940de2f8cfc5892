"""Ray actors on GPUs: colocated on one, and two halves that share it, say the same."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rows import Row

import pdray

QUESTIONS = [
    "What is the capital of France?",
    "Name three primary colors.",
    "Write one sentence about the sea, and a second one about the mountains behind it.",
    "Count from one to ten.",
]
PARAMS = [
    pdray.SamplingParams(temperature=0, max_tokens=32),
    pdray.SamplingParams(temperature=0.8, seed=7, max_tokens=32, n=2),
    pdray.SamplingParams(temperature=1.0, seed=8, top_p=0.9, max_tokens=48, presence_penalty=0.5),
    pdray.SamplingParams(temperature=0, max_tokens=48, stop=["five"]),
]


def answers(gguf: Path, **config: Any) -> list[list[str]]:
    """Float32, so that batches do not change a token."""
    base = {"device": "cuda", "dtype": "float32", "max_model_len": 1024}
    with pdray.LLM(str(gguf), **base | config) as llm:
        messages = [[{"role": "user", "content": question}] for question in QUESTIONS]
        outputs = llm.chat(messages, PARAMS, use_tqdm=False)
    return [[completion.text for completion in output.outputs] for output in outputs]


def check_shared(gguf: Path | None) -> Iterator[Row]:
    """Two half-GPU actors with the object store between them, as where memory cannot be lent."""
    if gguf is None:
        yield Row("two halves of a GPU", "no --gguf FILE given", "as colocated", None)
        return
    whole = answers(gguf, mode="colocated")
    yield Row("colocated actor", repr(whole[0][0]), "Paris", "Paris" in whole[0][0])
    halves = answers(gguf, prefill_num_gpus=0.5, decode_num_gpus=0.5, channel="object_store")
    same = sum(a == b for a, b in zip(whole, halves, strict=True))
    yield Row("two halves of a GPU", f"{same} of {len(whole)} the same", "as colocated", same == len(whole))
