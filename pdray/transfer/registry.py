"""The channel kinds that there are, and which one a pair of workers gets."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from pdray.errors import ConfigError

if TYPE_CHECKING:
    from pdray.transfer.channel import Kind
    from pdray.wire.cluster_view import WorkerInfo

# By name, the fastest first: module and class. What joins any two workers stands last.
KINDS = {
    "nccl": "pdray.transfer.nccl.kind:NcclKind",
    "object_store": "pdray.transfer.object_store.kind:ObjectStoreKind",
}


def load_kind(name: str) -> type[Kind]:
    """The kind's class; imports it, and what it needs."""
    module, _, class_name = KINDS[name].partition(":")
    kind: type[Kind] = getattr(import_module(module), class_name)
    return kind


def allowed_kinds(channel: str) -> list[str]:
    """Kinds that a configured ``channel`` allows."""
    return list(KINDS) if channel == "auto" else [channel]


def choose_kind(channel: str, prefill: WorkerInfo, decode: WorkerInfo) -> str:
    """The configured kind, or by itself the first that can join the two.

    Raises:
        ConfigError: the kind that was asked for cannot.
    """
    obstacle = None
    for name in allowed_kinds(channel):
        obstacle = load_kind(name).obstacle(prefill, decode)
        if obstacle is None:
            return name
    raise ConfigError(f"channel is {channel}, but {obstacle}; set channel to auto or object_store")
