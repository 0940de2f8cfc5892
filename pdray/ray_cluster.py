"""Joining a running Ray cluster, or starting one that ends with this process."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import psutil
import ray
from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
from ray._private.services import canonicalize_bootstrap_address

from pdray.cache import cache_folder, make_folder
from pdray.errors import PdrayError
from pdray.interrupts import interrupts_held
from pdray.quick_ray import quick_start
from pdray.reachable import CLIENT_SCHEME, is_reachable, require_admission, require_reachable, split_address

LOCAL = "local"


class SharedCluster(msgspec.Struct, frozen=True):
    """Attributes:
    pid, created: of the process with whose end the cluster ends, and when it began: pids are used again.
    token: Ray's, for this cluster alone.
    """

    pid: int
    address: str
    token: str
    created: float = 0.0


def join(address: str | None) -> None:
    """Join a running cluster: the one named, RAY_ADDRESS's, one that `pdray serve` has started, or this machine's.

    Raises:
        PdrayError: there is none, or the one that is named does not answer.
    """
    address = address or os.environ.get("RAY_ADDRESS")
    if address == LOCAL:
        raise PdrayError("`local` starts a Ray cluster, and there is none to join yet; give a running one's host:port")
    shared = find_shared()
    if shared is not None and (address or shared.address) == shared.address:
        address = shared.address
        os.environ.setdefault("RAY_AUTH_TOKEN", shared.token)
        # ray.init() does this for an address that it finds by itself, and not for one that it is given.
        logging.getLogger(maybe_enable_token_auth_if_token_available.__module__).setLevel(logging.ERROR)
        maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    named = address or "this machine"
    try:
        if address not in (None, "auto"):
            split_address(address)
        if address is None or not address.startswith(CLIENT_SCHEME):
            address = canonicalize_bootstrap_address(address or "auto")
        assert address is not None
        require_reachable(address)
        require_admission(address)
        _init(address=address)
    except (ConnectionError, ValueError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise PdrayError(f"no Ray cluster to join at {named}: {reason}") from error


def _init(*, hold: bool = False, **options: Any) -> None:
    """ray.init() without its messages, and with SIGTERM's handler as it was if there is one.

    Ray would put its own in its place, and at once: it ends the process by SystemExit, also in the midst of ray.init().

    Args:
        hold: let signals wait until it has returned.
    """
    before = signal.getsignal(signal.SIGTERM)
    wanted: list[Any] = []
    set_handler = ray._private.utils.set_sigterm_handler
    with interrupts_held() if hold else contextlib.nullcontext():
        ray._private.utils.set_sigterm_handler = wanted.append
        try:
            ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)
        finally:
            ray._private.utils.set_sigterm_handler = set_handler
            if threading.current_thread() is threading.main_thread():
                if before is signal.SIG_DFL and wanted:
                    signal.signal(signal.SIGTERM, wanted[-1])
                elif not hold:
                    signal.signal(signal.SIGTERM, before)


def _shared_file() -> Path:
    return cache_folder() / "cluster.json"


def find_shared() -> SharedCluster | None:
    """The cluster that start_local(shared=True) started last, while its process lives."""
    try:
        shared = msgspec.json.decode(_shared_file().read_bytes(), type=SharedCluster)
        created = psutil.Process(shared.pid).create_time()
    except (FileNotFoundError, PermissionError, msgspec.DecodeError, psutil.Error):
        return None
    same = abs(created - shared.created) < 1.0
    return shared if same and is_reachable(shared.address) else None


def start_local(*, shared: bool = False, **options: Any) -> None:
    """Start a cluster of this process's own.

    Ray gives such a cluster token authentication and, without a token, writes a new one to ~/.ray; from then on every
    `ray start` on this machine would ask for it too. So the token is made here, for this process's life.

    Args:
        shared: let this user's other processes join() it.
        options: of ray.init(). Without a dashboard it starts as quick_start() says.

    Raises:
        PdrayError: it did not start, or the cache's folder, where others find it, cannot be written.
    """
    path = _shared_file()
    if shared:
        make_folder(path.parent)
    if "RAY_AUTH_MODE" not in os.environ and "RAY_AUTH_TOKEN_PATH" not in os.environ:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(16))
    try:
        is_quick = options.get("include_dashboard") is False
        with quick_start() if is_quick else contextlib.nullcontext():
            _init(address=LOCAL, hold=True, **options)
    except (OSError, ValueError, RuntimeError) as error:
        raise PdrayError(f"Ray could not be started: {error}") from error
    if shared:
        address = ray.get_runtime_context().gcs_address
        me = psutil.Process()
        record = SharedCluster(me.pid, address, os.environ.get("RAY_AUTH_TOKEN", ""), me.create_time())
        path.unlink(missing_ok=True)
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(msgspec.json.encode(record))


def join_or_start(
    address: str | None, *, shared: bool = False, before_start: Callable[[], None] = lambda: None
) -> bool:
    """Join a running cluster, or start one if none is named and none runs; "local" always starts one.

    One that is not shared ends with this process, and has no dashboard: it would take half of the time to start.
    Returns whether one was started.

    Args:
        before_start: called when one is to be started; raises if it would be in vain.
    """
    if (address or os.environ.get("RAY_ADDRESS")) != LOCAL:
        try:
            join(address)
            return False
        except PdrayError:
            if address is not None or os.environ.get("RAY_ADDRESS"):
                raise
    before_start()
    start_local(shared=shared, include_dashboard=shared)
    return True
