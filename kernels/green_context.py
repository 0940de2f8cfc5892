"""Partitions of a GPU's multiprocessors (SMs), each with a stream whose kernels run there and nowhere else.

CUDA calls them green contexts: no context to switch to, but a share of the SMs that streams are made for. They use the
device's primary context: memory, modules and events of torch are as good there as anywhere. A CUDA graph that was
captured on such a stream keeps its partition wherever it is replayed.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch

logger = logging.getLogger(__name__)

MIN_CUDA = 12050  # the first whose driver makes streams of a green context


class UnavailableError(RuntimeError):
    """The device's SMs cannot be split so; the text says why, and what would have to change."""


class Partition(NamedTuple):
    """Some of a device's SMs.

    Attributes:
        num_sms: of the partition; of a plain stream, the device's.
        stream: on CPU None.
    """

    num_sms: int
    stream: torch.cuda.Stream | None


class SmSplit:
    """Two partitions of one device that share no SM; or, where that cannot be, two plain streams.

    Graphs that were captured on its streams must be gone before close().

    Attributes:
        first: of so many SMs as were asked for. rest: of all others.
        unavailable: why these are plain streams; None: they are partitions.
    """

    def __init__(
        self, first: Partition, rest: Partition, unavailable: str | None = None, release: ExitStack | None = None
    ) -> None:
        self.first = first
        self.rest = rest
        self.unavailable = unavailable
        self._release = release or ExitStack()

    @property
    def num_sms(self) -> int:
        """SMs of the device."""
        return self.first.num_sms + (self.rest.num_sms if self.unavailable is None else 0)

    def close(self) -> None:
        """Wait for both streams, destroy them, then the partitions. Idempotent."""
        self._release.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def split_sms(
    device: torch.device,
    num_sms: int,
    *,
    driver: Any = None,
    wrap: Callable[[int, torch.device], Any] = torch.cuda.ExternalStream,
) -> SmSplit:
    """Split a device's SMs into ``num_sms`` and the rest.

    The streams do not wait for the default stream, nor it for them; the first one's has the higher priority, which
    counts where both want the same part of the device that is not split: copy engines, and the launch of graphs.

    Args:
        driver: cuda.bindings.driver, or what stands for it. wrap: makes torch's stream of a handle.

    Raises:
        UnavailableError: it cannot be done here. What had been made by then is released.
    """
    if device.type != "cuda":
        raise UnavailableError(f"{device} has no SMs to split; only CUDA devices have")
    cu = driver or _load_driver()
    with ExitStack() as made:
        version = _call(cu.cuDriverGetVersion)
        if version < MIN_CUDA:
            raise UnavailableError(
                f"the driver is for CUDA {version // 1000}.{version % 1000 // 10}, and partitions need "
                f"{MIN_CUDA // 1000}.{MIN_CUDA % 1000 // 10} or later; update it"
            )
        handle = _call(cu.cuDeviceGet, torch.cuda.current_device() if device.index is None else device.index)
        whole = _call(cu.cuDeviceGetDevResource, handle, cu.CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM)
        groups = _divide(cu, whole, num_sms)
        streams = []
        for priority, group in zip((-1, 0), groups, strict=True):
            description = _call(cu.cuDevResourceGenerateDesc, [group], 1)
            flags = cu.CUgreenCtxCreate_flags.CU_GREEN_CTX_DEFAULT_STREAM
            context = _call(cu.cuGreenCtxCreate, description, handle, flags)
            made.callback(_call, cu.cuGreenCtxDestroy, context)
            flag = cu.CUstream_flags.CU_STREAM_NON_BLOCKING
            streams.append(_call(cu.cuGreenCtxStreamCreate, context, flag, priority))
            made.callback(_call, cu.cuStreamDestroy, streams[-1])
        for stream in streams:  # closing goes backwards: wait for all, destroy the streams, then their contexts
            made.callback(_call, cu.cuStreamSynchronize, stream)
        first, rest = (
            Partition(int(group.sm.smCount), wrap(int(stream), device))
            for group, stream in zip(groups, streams, strict=True)
        )
        return SmSplit(first, rest, release=made.pop_all())


def plain_streams(device: torch.device, reason: str) -> SmSplit:
    """Two streams that share every SM, the first of higher priority; on CPU none.

    Args:
        reason: why there are no partitions.
    """
    if device.type != "cuda":
        return SmSplit(Partition(0, None), Partition(0, None), reason)
    num_sms = torch.cuda.get_device_properties(device).multi_processor_count
    first, rest = (Partition(num_sms, torch.cuda.Stream(device, priority=priority)) for priority in (-1, 0))
    return SmSplit(first, rest, reason)


def open_splits(
    device: torch.device, sizes: Iterable[int], split: Callable[[torch.device, int], SmSplit] = split_sms
) -> list[SmSplit]:
    """A split for each number of SMs that the device can hand out, in order; else one pair of plain streams.

    Logs one line for all that cannot be had.
    """
    splits: list[SmSplit] = []
    reasons: list[str] = []
    for num_sms in sizes:
        try:
            splits.append(split(device, num_sms))
        except UnavailableError as error:
            reasons.append(str(error))
    if reasons:
        left = f"go on with {', '.join(str(s.first.num_sms) for s in splits)} SMs" if splits else "on plain streams"
        logger.warning("no SM partitions as asked for, %s: %s", left, "; ".join(dict.fromkeys(reasons)))
    return splits or [plain_streams(device, "; ".join(dict.fromkeys(reasons)) or "no partition was asked for")]


def _divide(cu: Any, whole: Any, num_sms: int) -> tuple[Any, Any]:
    """Two resources. The driver rounds up to what the device hands out; that is not what was asked for."""
    total = int(whole.sm.smCount)
    if not 0 < num_sms < total:
        raise UnavailableError(f"{num_sms} of {total} SMs leave nothing for one side; ask for 1 to {total - 1}")
    groups, count, rest = _call(cu.cuDevSmResourceSplitByCount, 1, whole, 0, num_sms)
    if count < 1 or int(rest.sm.smCount) < 1:
        raise UnavailableError(f"{num_sms} of {total} SMs cannot be split off; ask for fewer")
    given = int(groups[0].sm.smCount)
    if given != num_sms:
        raise UnavailableError(f"the device hands out {given} of its {total} SMs where {num_sms} are asked for")
    return groups[0], rest


def _load_driver() -> Any:
    try:
        driver = importlib.import_module("cuda.bindings.driver")
    except ImportError as error:
        raise UnavailableError(f"no cuda.bindings ({error}); install pdray[cuda13] or pdray[cuda12]") from None
    if not hasattr(driver, "cuGreenCtxStreamCreate"):
        raise UnavailableError("cuda.bindings is older than 12.5, which brought green contexts; update cuda-python")
    return driver


def _call(function: Callable[..., Any], *args: Any) -> Any:
    """The results of a driver's function: none, one, or a tuple.

    Raises:
        UnavailableError: names the function and CUDA's error.
    """
    try:
        error, *results = function(*args)
    except RuntimeError as missing:  # cuda.bindings does not find the function in this driver
        raise UnavailableError(f"{function.__name__} failed: {missing}; update the driver") from missing
    if int(error) != 0:
        raise UnavailableError(f"{function.__name__} failed: {getattr(error, 'name', error)}")
    return results[0] if len(results) == 1 else tuple(results)
