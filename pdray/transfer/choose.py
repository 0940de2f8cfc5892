"""Which channel a pair of workers gets."""

from __future__ import annotations

from typing import Literal

from pdray.cluster.messages import WorkerInfo
from pdray.config import Config
from pdray.errors import ConfigError


def choose_channel(config: Config, prefill: WorkerInfo, decode: WorkerInfo) -> Literal["nccl", "object_store"]:
    """As configured; by itself, nccl between two GPUs and the object store everywhere else.

    Raises:
        ConfigError: channel is nccl, and these two cannot use it.
    """
    if config.channel == "object_store":
        return "object_store"
    obstacle = nccl_obstacle(prefill, decode)
    if obstacle is None:
        return "nccl"
    if config.channel == "auto":
        return "object_store"
    if prefill.gpu and prefill.gpu == decode.gpu and config.nccl_on_one_gpu:
        return "nccl"
    raise ConfigError(f"channel is nccl, but {obstacle}; set channel to auto or object_store")


def nccl_obstacle(prefill: WorkerInfo, decode: WorkerInfo) -> str | None:
    """Why these two cannot use NCCL; None if they can."""
    for info in (prefill, decode):
        if not info.gpu:
            return f"{info.worker_id} runs on {info.device}"
        if not info.nccl:
            return f"{info.worker_id} has no NCCL: install pdray[cuda12] or pdray[cuda13]"
    if prefill.nccl != decode.nccl:
        return f"{prefill.worker_id} has NCCL {prefill.nccl} and {decode.worker_id} has {decode.nccl}"
    if prefill.gpu == decode.gpu:
        return f"{prefill.worker_id} and {decode.worker_id} share {prefill.gpu}, and NCCL takes a GPU only once"
    return None
