"""Ray actors on GPUs: two halves that share one, with one pool and one copy of the weights, and with one each."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from reference import requests
from rows import Row

import pdray
from pdray.engine.kv.sizing import guest_bytes

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
MODEL = {  # as Qwen3-0.6B, with random weights
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "attention_bias": False,
    "eos_token_id": 151645,
}
HALVES = {"prefill_num_gpus": 0.5, "decode_num_gpus": 0.5}
BACKOFF_S = 6.0  # in which a dead guest's memory is free
PATIENCE_S = 90.0
POLL_S = 0.1


def answers(gguf: Path, **config: Any) -> list[list[str]]:
    """Float32, so that batches do not change a token."""
    base = {"device": "cuda", "dtype": "float32", "max_model_len": 1024}
    with pdray.LLM(str(gguf), **base | config) as llm:
        messages = [[{"role": "user", "content": question}] for question in QUESTIONS]
        outputs = llm.chat(messages, PARAMS, use_tqdm=False)
    return [[completion.text for completion in output.outputs] for output in outputs]


def check_shared(gguf: Path | None) -> Iterator[Row]:
    """Two half-GPU actors: in one memory, and with the object store between them, as where it cannot be lent."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(MODEL))
        yield from check_one_memory(path)
    if gguf is None:
        yield Row("two halves of a GPU", "no --gguf FILE given", "as colocated", None)
        return
    whole = answers(gguf, mode="colocated")
    yield Row("colocated actor", repr(whole[0][0]), "Paris", "Paris" in whole[0][0])
    for channel in ("shared", "object_store"):
        halves = answers(gguf, **HALVES, channel=channel)
        same = sum(a == b for a, b in zip(whole, halves, strict=True))
        yield Row(f"two halves of a GPU, {channel}", f"{same} of {len(whole)} the same", "all", same == len(whole))


def check_one_memory(model: Path) -> Iterator[Row]:
    """What a guest adds to the GPU, what the two say, and what is left when either dies."""
    config = {
        "model": str(model),
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "device": "cuda",
        "dtype": "float32",
    }
    reference = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("reference.py")), json.dumps(config)], stdout=subprocess.PIPE
    )
    prompts, params = requests()
    settings = config | HALVES | {"gpu_memory_utilization": 0.6, "restart_backoff_s": BACKOFF_S}
    with pdray.LLM(**settings) as llm:
        output, _ = reference.communicate()
        alone = json.loads(output.splitlines()[-1])
        yield Row("one memory: channel", _channel(llm), "shared", _channel(llm) == "shared")
        for name in ("new prompts", "cached prompts"):
            said = [
                [completion.token_ids for completion in each.outputs]
                for each in llm.generate(prompts, params, use_tqdm=False)
            ]
            same = sum(a == b for a, b in zip(said, alone["said"], strict=True))
            yield Row(f"one memory: {name}", f"{same} of {len(said)} the same", "all", same == len(said))
        pids = {row["worker_id"]: row["pid"] for row in llm.status()["workers"]}
        guest = _freed_by(pids["prefill-0"])
        limit = guest_bytes(alone["activations"])
        parts = f"{_gib(limit)}: its context and twice {_gib(alone['activations'])} of activations"
        yield Row("one memory: the guest's", _gib(guest), f"<= {parts}", 0 < guest <= limit)
        lender = _freed_by(pids["decode-0"])
        num_bytes = f"{_gib(alone['weights'])} of weights among them"
        yield Row("one memory: the lender's", _gib(lender), f"> the guest's; {num_bytes}", lender > guest)
        yield _served_again(llm, prompts, params, alone["said"], pids)


def _channel(llm: pdray.LLM) -> str:
    rows = {row["worker_id"]: row for row in llm.status()["workers"]}
    return str(rows["prefill-0"]["channels"].get("decode-0"))


def _freed_by(pid: int) -> int:
    """Bytes of the GPU that come back with the end of a process."""
    before = torch.cuda.mem_get_info()[0]
    os.kill(pid, signal.SIGKILL)
    most, deadline = before, time.monotonic() + BACKOFF_S / 2
    while time.monotonic() < deadline:
        most = max(most, torch.cuda.mem_get_info()[0])
        time.sleep(POLL_S)
    return most - before


def _served_again(
    llm: pdray.LLM, prompts: list[list[int]], params: list[pdray.SamplingParams], said: Any, pids: dict[str, int]
) -> Row:
    """After both have died: two new processes, as before."""
    deadline = time.monotonic() + PATIENCE_S
    while llm.status()["state"] != "serving" and time.monotonic() < deadline:
        time.sleep(POLL_S)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    again = [[completion.token_ids for completion in each.outputs] for each in outputs]
    same = sum(a == b for a, b in zip(again, said, strict=True))
    new = sum(row["pid"] != pids[row["worker_id"]] for row in llm.status()["workers"])
    figure = f"{same} of {len(said)} the same, by {new} new processes over {_channel(llm)}"
    return Row("one memory: after both died", figure, "all, 2, shared", (same, new) == (len(said), 2))


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
