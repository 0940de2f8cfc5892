"""The channel kinds that there are, and which one a pair of workers gets."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, NamedTuple

from pdray.errors import ConfigError

if TYPE_CHECKING:
    from pdray.transfer.channel import Kind
    from pdray.wire.cluster_view import WorkerInfo

# By name, the fastest first: module and class. What joins any two workers stands last.
KINDS = {
    "shared": "pdray.transfer.shared.kind:SharedKind",
    "cuda_ipc": "pdray.transfer.cuda_ipc.kind:CudaIpcKind",
    "nccl": "pdray.transfer.nccl.kind:NcclKind",
    "object_store": "pdray.transfer.object_store.kind:ObjectStoreKind",
}

OF_RANKS = ("object_store",)  # that join workers of several ranks, whose heads lie in several processes


def load_kind(name: str) -> type[Kind]:
    """The kind's class; imports it, and what it needs."""
    module, _, class_name = KINDS[name].partition(":")
    kind: type[Kind] = getattr(import_module(module), class_name)
    return kind


def allowed_kinds(channel: str, *, has_ranks: bool = False) -> list[str]:
    """Kinds that a configured ``channel`` allows.

    Args:
        has_ranks: prefill or decode workers have several; see ranks_obstacle().
    """
    kinds = list(KINDS) if channel == "auto" else [channel]
    return [kind for kind in kinds if kind in OF_RANKS] if has_ranks else kinds


def ranks_obstacle(channel: str) -> str | None:
    """Why a configured ``channel`` cannot join workers of which some have several ranks; None if it can."""
    if channel == "auto" or channel in OF_RANKS:
        return None
    return f"{channel} joins workers of one rank each"


def _obstacle(kind: str, prefill: WorkerInfo, decode: WorkerInfo) -> str | None:
    for info in (prefill, decode):
        if info.num_ranks > 1 and kind not in OF_RANKS:
            return f"{info.worker_id} has {info.num_ranks} ranks, and {kind} joins workers of one"
    return load_kind(kind).obstacle(prefill, decode)


class Choice(NamedTuple):
    """The kind that a pair gets, and why not one that would be faster: by kind."""

    kind: str
    passed_over: dict[str, str]


def choose_kind(
    channel: str, prefill: WorkerInfo, decode: WorkerInfo, failures: Mapping[str, str] | None = None
) -> Choice:
    """The configured kind, or by itself the first that can join the two.

    Args:
        failures: kinds that have been tried between the two, and why they do not work.

    Raises:
        ConfigError: the kind that was asked for cannot.
    """
    passed_over: dict[str, str] = {}
    for name in allowed_kinds(channel):
        obstacle = _obstacle(name, prefill, decode) or (failures or {}).get(name)
        if obstacle is None:
            return Choice(name, passed_over)
        passed_over[name] = obstacle
    reasons = ", and ".join(passed_over.values())
    raise ConfigError(f"channel is {channel}, but {reasons}; set channel to auto or object_store")
