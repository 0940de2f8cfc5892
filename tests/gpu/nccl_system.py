"""The whole system over each channel: on one GPU (two hosts to NCCL, or lent memory), and on two as it is meant."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from cuda_ipc_channel import check_cuda_ipc
from nccl_channel import check_channel
from rows import Row
from shared_gpu import PARAMS, QUESTIONS

import pdray
from pdray.testing.one_gpu import one_gpu_environment

MIB_AT_LEAST = 1024  # that each worker adds to its GPU: pool, weights, context
NUM_MIXED = 256


class Answers(NamedTuple):
    """What one application said, and what it looked like."""

    texts: list[list[str]]
    channels: dict[str, str]
    lost_blocks: list[int]
    num_mixed: int = 0
    mib: list[int] = []


def ask(gguf: Path, *, mixed: int = 0, **config: Any) -> Answers:
    """Float32, so that batches do not change a token."""
    base = {"device": "cuda", "dtype": "float32", "max_model_len": 1024, "max_num_seqs": 256}
    with pdray.LLM(str(gguf), **base | config) as llm:
        messages = [[{"role": "user", "content": question}] for question in QUESTIONS]
        outputs = llm.chat(messages, PARAMS, use_tqdm=False)
        texts = [[completion.text for completion in output.outputs] for output in outputs]
        num_mixed = 0
        if mixed:
            prompts, params = mixed_requests(mixed)
            done = llm.generate(prompts, params, use_tqdm=False)
            lengths = [len(output.outputs[0].token_ids) for output in done]
            num_mixed = sum(length == p.max_tokens for length, p in zip(lengths, params, strict=True))
        workers = llm.status()["workers"]
        mib = memory_mib()
    lost = [worker["num_blocks"] - 1 - worker["free_blocks"] for worker in workers]
    channels = next((worker["channels"] for worker in workers if "channels" in worker), {})
    return Answers(texts, channels, lost, num_mixed, mib)


def mixed_requests(count: int) -> tuple[list[list[int]], list[pdray.SamplingParams]]:
    """Short and long prompts and answers."""
    rng = random.Random(2)
    prompts = [[rng.randrange(20, 40_000) for _ in range(rng.randint(1, 800))] for _ in range(count)]
    params = [
        pdray.SamplingParams(
            temperature=rng.choice([0.0, 1.0]), seed=i, max_tokens=rng.randint(1, 200), ignore_eos=True
        )
        for i in range(count)
    ]
    return prompts, params


def memory_mib() -> list[int]:
    """In use on each GPU, by everyone."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return [int(line) for line in subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()]


def compare(name: str, whole: Answers, apart: Answers, kind: str = "nccl") -> Iterator[Row]:
    yield Row(f"{name}: channel", str(apart.channels), kind, apart.channels == {"decode-0": kind})
    same = sum(a == b for a, b in zip(whole.texts, apart.texts, strict=True))
    yield Row(f"{name}: answers", f"{same} of {len(whole.texts)} the same", "as colocated", same == len(whole.texts))
    clean = not any(apart.lost_blocks)
    figure = f"{apart.num_mixed} of {NUM_MIXED} finished, blocks in use {apart.lost_blocks}"
    yield Row(f"{name}: {NUM_MIXED} mixed requests", figure, "all, 0", clean and apart.num_mixed == NUM_MIXED)


def check_nccl(gguf: Path | None) -> Iterator[Row]:
    """The channel alone, then two half-GPU actors with it."""
    yield from check_channel()
    if gguf is None:
        yield Row("two halves of a GPU over nccl", "no --gguf FILE given", "as colocated", None)
        return
    whole = ask(gguf, mode="colocated")
    environment = one_gpu_environment("{worker_id}")
    halves = {"prefill_num_gpus": 0.5, "decode_num_gpus": 0.5, "channel": "nccl", "worker_env": environment}
    yield from compare("two halves of a GPU over nccl", whole, ask(gguf, mixed=NUM_MIXED, **halves))


def check_lent(gguf: Path | None) -> Iterator[Row]:
    """The cuda_ipc channel alone, then two half-GPU actors with it."""
    yield from check_cuda_ipc()
    if gguf is None:
        yield Row("two halves of a GPU over cuda_ipc", "no --gguf FILE given", "as colocated", None)
        return
    whole = ask(gguf, mode="colocated")
    apart = ask(gguf, mixed=NUM_MIXED, prefill_num_gpus=0.5, decode_num_gpus=0.5, channel="cuda_ipc")
    yield from compare("two halves of a GPU over cuda_ipc", whole, apart, "cuda_ipc")


def check_two(gguf: Path | None) -> Iterator[Row]:
    """Prefill on one GPU, decode on another."""
    if torch.cuda.device_count() < 2 or gguf is None:
        reason = "one GPU here" if gguf is not None else "no --gguf FILE given"
        yield Row("two GPUs", reason, "as colocated", None)
        return
    before = memory_mib()
    whole = ask(gguf, mode="colocated")
    yield from compare("two GPUs, nccl", whole, ask(gguf, mixed=NUM_MIXED, channel="nccl"))
    apart = ask(gguf, mixed=NUM_MIXED)
    yield from compare("two GPUs", whole, apart, "cuda_ipc")
    added = [now - then for now, then in zip(apart.mib, before, strict=True)][:2]
    ok = all(mib >= MIB_AT_LEAST for mib in added)
    yield Row("two GPUs: memory", f"{added} MiB more", f">= {MIB_AT_LEAST} on each", ok)
