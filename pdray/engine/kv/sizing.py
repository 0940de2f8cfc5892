"""The size of a worker's KV pool."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

from pdray.config import Config
from pdray.engine.kv.layout import KVLayout
from pdray.errors import ConfigError, OutOfMemoryError

logger = logging.getLogger(__name__)

GUEST_CONTEXT_BYTES = 1024**3  # of CUDA: context, kernels, libraries' workspaces, graphs; inputs and outputs of steps
CGROUP_FILES = (  # limit, usage; versions 2 and 1
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


class GpuRoom(NamedTuple):
    """What a worker may use of its GPU.

    Attributes:
        share: of the whole GPU.
        num_outside_bytes: that this process has allocated, and not through torch.
        num_guests: processes that will compute over the same pool, with the same weights: see guest_bytes().
    """

    share: float = 1.0
    num_outside_bytes: int = 0
    num_guests: int = 0


WHOLE_GPU = GpuRoom()


def guest_bytes(activations: int) -> int:
    """Memory that a guest takes of a GPU at most: context, and activations twice, for those of CUDA graphs are kept.

    Args:
        activations: of the largest step.
    """
    return 2 * activations + GUEST_CONTEXT_BYTES


def choose_num_blocks(
    config: Config,
    layout: KVLayout,
    device: torch.device,
    max_model_len: int,
    *,
    room: GpuRoom = WHOLE_GPU,
    num_ranks: int = 1,
    profile: Callable[[], None] | None = None,
) -> int:
    """Size of the pool in blocks, the dummy block included.

    num_kv_blocks, else what kv_cache_memory_bytes holds, else a share of what is free: on CPU
    cpu_memory_utilization of available memory, on CUDA gpu_memory_utilization * room.share of the GPU less what the
    process uses at the peak of ``profile``, and what it leaves to guests. Never more than max_num_seqs sequences of
    max_model_len can fill.

    Args:
        num_ranks: processes that have such a pool each; on CPU they divide what a worker may take.

    Raises:
        ConfigError: num_kv_blocks is too small for any request.
        OutOfMemoryError: one sequence of max_model_len does not fit.
    """
    if config.num_kv_blocks is not None:
        if config.num_kv_blocks < 2:
            raise ConfigError("num_kv_blocks is 1, but one block is kept for padding; it must be at least 2")
        return config.num_kv_blocks
    size = layout.block_bytes
    blocks_per_sequence = -(-max_model_len // config.block_size)
    if config.kv_cache_memory_bytes is not None:
        available, setting = config.kv_cache_memory_bytes, "kv_cache_memory_bytes"
    elif device.type == "cpu":
        share = config.cpu_memory_utilization / num_ranks
        available, setting = int(available_host_bytes() * share), "cpu_memory_utilization"
    else:
        available, setting = _available_gpu_bytes(config, device, room, profile), "gpu_memory_utilization"
    num_blocks = available // size
    if num_blocks < blocks_per_sequence + 1:
        longest = longest_sequence(num_blocks, config.block_size)
        raise OutOfMemoryError(
            f"KV cache needs {_gib((blocks_per_sequence + 1) * size)} for one {max_model_len:,}-token sequence, but "
            f"{_gib(available)} is free for it on {device} ({setting} is {getattr(config, setting)}); "
            + (f"lower max_model_len to {longest:,} or less, or raise {setting}" if longest > 1 else f"raise {setting}")
        )
    return min(num_blocks, config.max_num_seqs * blocks_per_sequence + 1)


def longest_sequence(num_blocks: int, block_size: int) -> int:
    """Tokens of one sequence that a pool of so many blocks, the dummy block included, can hold."""
    return (num_blocks - 1) * block_size


def usable_model_len(max_model_len: int, num_blocks: int, block_size: int) -> int:
    """Tokens of prompt and output that an engine takes: the configured limit, or what its pool holds."""
    longest = longest_sequence(num_blocks, block_size)
    if longest < max_model_len:  # only num_kv_blocks asks for a pool so small
        logger.warning(
            "max_model_len is %d, not %d: num_kv_blocks (%d) holds no longer sequence; raise it to %d or more",
            *(longest, max_model_len, num_blocks, -(-max_model_len // block_size) + 1),
        )
    return min(max_model_len, longest)


def available_host_bytes() -> int:
    """Memory that this process could still use: the machine's, or its container's if that is less."""
    available = int(psutil.virtual_memory().available)
    for limit_file, usage_file in CGROUP_FILES:
        limit, usage = _read_int(limit_file), _read_int(usage_file)
        if limit is not None and usage is not None:
            available = min(available, max(0, limit - usage))
    return available


def _available_gpu_bytes(
    config: Config, device: torch.device, room: GpuRoom, profile: Callable[[], None] | None
) -> int:
    """This worker's share of the GPU, less weights and the peak of activations, its guests' too."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    if profile is not None:
        profile()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    activations = peak - torch.cuda.memory_allocated(device)
    for_guests = room.num_guests * guest_bytes(activations)
    budget = int(total * config.gpu_memory_utilization * room.share) - peak - room.num_outside_bytes
    return max(0, min(budget, free - activations) - for_guests)


def _read_int(path: str) -> int | None:
    """The number in a file; None if there is no such file, or it says "max"."""
    file = Path(path)
    text = file.read_text().strip() if file.is_file() else ""
    return int(text) if text.isdigit() else None


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
