"""The one connection of this process to Ray: its owner, its users, and its end."""

from __future__ import annotations

import threading

import ray

from pdray.errors import ConfigError
from pdray.ray_cluster import join_or_start

_lock = threading.Lock()
_holds: set[RayHold] = set()  # of the connection that was opened here; empty if there is none, or the driver opened it


class RayHold:
    """A claim on the connection. The last release() closes it, and ends a cluster that was started with it.

    A connection that was there before the first claim is the driver's own, and stays.
    """

    def __init__(self, session: str, address: str | None) -> None:
        self.session = session
        self.address = address

    def release(self) -> None:
        """Idempotent."""
        with _lock:
            if self not in _holds:
                return
            _holds.remove(self)
            if not _holds and ray.is_initialized() and _session() == self.session:
                ray.shutdown()


def hold_ray(address: str | None) -> RayHold:
    """Use the connection that is there, or join or start a cluster as join_or_start() does.

    Raises:
        ConfigError: the process is connected, and to another cluster than `address`.
        PdrayError: there is no such cluster.
    """
    with _lock:
        if not ray.is_initialized():
            _holds.clear()  # the driver has called ray.shutdown() itself
            join_or_start(address)
            hold = RayHold(_session(), address)
            _holds.add(hold)
            return hold
        session = _session()
        mine = next((hold for hold in _holds if hold.session == session), None)
        if address is not None and address not in (session, "auto", None if mine is None else mine.address):
            raise ConfigError(
                f"ray_address is {address!r}, but this process is connected to Ray at {session}: one process has one "
                "connection; leave ray_address out, or shut down what uses the other"
            )
        hold = RayHold(session, address)
        if mine is not None:
            _holds.add(hold)
        return hold


def _session() -> str:
    """The cluster's address, which no two of them share."""
    return str(ray.get_runtime_context().gcs_address)
