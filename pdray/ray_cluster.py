"""Joining a running Ray cluster, or starting one that ends with this process."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import threading
from pathlib import Path
from typing import Any

import msgspec
import psutil
import ray
from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available

from pdray.cache import cache_folder
from pdray.errors import PdrayError
from pdray.interrupts import interrupts_held


class SharedCluster(msgspec.Struct, frozen=True):
    """Attributes:
    pid: of the process with whose end the cluster ends. token: Ray's, for this cluster alone.
    """

    pid: int
    address: str
    token: str


def join(address: str | None) -> None:
    """Join a running cluster: the one named, RAY_ADDRESS's, one that `pdray serve` has started, or this machine's.

    Raises:
        PdrayError: there is none.
    """
    shared = find_shared()
    if shared is not None and (address or os.environ.get("RAY_ADDRESS") or shared.address) == shared.address:
        address = shared.address
        os.environ.setdefault("RAY_AUTH_TOKEN", shared.token)
        # ray.init() does this for an address that it finds by itself, and not for one that it is given.
        logging.getLogger(maybe_enable_token_auth_if_token_available.__module__).setLevel(logging.ERROR)
        maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    try:
        _init(address=address or "auto")
    except (ConnectionError, ValueError) as error:
        raise PdrayError(f"no Ray cluster to join at {address or 'this machine'}: {error}") from error


def _init(**options: Any) -> None:
    """ray.init() without its talk. A handler of SIGTERM that was set stays; Ray would put its own in its place."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)
    finally:
        if handler is not signal.SIG_DFL and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


def _shared_file() -> Path:
    return cache_folder() / "cluster.json"


def find_shared() -> SharedCluster | None:
    """The cluster that start_local(shared=True) started last, while its process lives."""
    try:
        shared = msgspec.json.decode(_shared_file().read_bytes(), type=SharedCluster)
    except (FileNotFoundError, msgspec.DecodeError):
        return None
    return shared if psutil.pid_exists(shared.pid) else None


def start_local(*, shared: bool = False, **options: Any) -> None:
    """Start a cluster of this process's own.

    Ray gives such a cluster token authentication and, without a token, writes a new one to ~/.ray; from then on every
    `ray start` on this machine would ask for it too. So the token is made here, for this process's life.

    Args:
        shared: let this user's other processes join() it.
        options: of ray.init().
    """
    if "RAY_AUTH_MODE" not in os.environ and "RAY_AUTH_TOKEN_PATH" not in os.environ:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(16))
    with interrupts_held():
        _init(address="local", **options)
    if shared:
        address = ray.get_runtime_context().gcs_address
        record = SharedCluster(os.getpid(), address, os.environ.get("RAY_AUTH_TOKEN", ""))
        path = _shared_file()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(msgspec.json.encode(record))


def join_or_start(address: str | None, *, shared: bool = False) -> None:
    """Join a running cluster, or start one if none is named and none runs; "local" always starts one.

    One that is not shared ends with this process, and has no dashboard: it would take half of the time to start.
    """
    if address != "local":
        try:
            return join(address)
        except PdrayError:
            if address is not None:
                raise
    start_local(shared=shared, include_dashboard=shared)
