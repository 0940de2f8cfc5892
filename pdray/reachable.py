"""Whether a Ray cluster answers at an address: asked first, because Ray itself tries for a minute and a half."""

from __future__ import annotations

import concurrent.futures
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from pdray.background import start_thread
from pdray.errors import PdrayError

T = TypeVar("T")

CONNECT_TIMEOUT_S = 5.0
WATCH_INTERVAL_S = 0.5
DEFAULT_CLIENT_PORT = 10001
CLIENT_SCHEME = "ray://"
CLUSTER_ID_METHOD = "/ray.rpc.NodeInfoGcsService/GetClusterId"
TOKEN_FILE = "~/.ray/auth_token"


def is_reachable(address: str) -> bool:
    """See require_reachable."""
    try:
        require_reachable(address)
    except (ConnectionError, ValueError):
        return False
    return True


class ClusterEndedError(PdrayError):
    """Ray's cluster has ended while something was being done in it."""


def while_reachable(address: str | None, work: Callable[[], T]) -> T:
    """Run `work` on a thread of its own, and stop waiting if the cluster ends: the thread may hang for a minute then.

    Args:
        address: of the cluster that `work` calls; None if it cannot be asked, as through Ray Client.

    Raises:
        ClusterEndedError: nothing answers at the address any more. What `work` raises.
    """
    done: concurrent.futures.Future[T] = concurrent.futures.Future()

    start_thread("pdray-cluster-work", lambda: done.set_result(work()), done.set_exception)
    while not done.done():
        concurrent.futures.wait([done], timeout=WATCH_INTERVAL_S)
        if address is not None and not done.done() and not is_reachable(address):
            raise ClusterEndedError(f"Ray's cluster at {address} has ended")
    return done.result()


def require_reachable(address: str) -> None:
    """Returns once something at host:port, or ray://host:port, speaks gRPC, as Ray does.

    Raises:
        ConnectionError: nothing listens there, nothing answers within CONNECT_TIMEOUT_S, or it is no Ray port.
        ValueError: it is no address.
    """
    timeout_s = CONNECT_TIMEOUT_S
    host, port = split_address(address)
    try:
        with socket.create_connection((host, port), timeout=timeout_s):
            pass
    except TimeoutError:
        raise ConnectionError(f"{host}:{port} does not answer ({timeout_s:g} s)") from None
    except OSError as error:
        raise ConnectionError(f"{host}:{port}: {error.strerror or error}") from None
    if os.environ.get("RAY_USE_TLS", "0") not in ("", "0"):
        return
    import grpc

    authority = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    with grpc.insecure_channel(authority, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=timeout_s)
        except grpc.FutureTimeoutError:
            raise ConnectionError(
                f"something listens at {host}:{port}, but no Ray: give the port that `ray start` has printed "
                "(6379 by default), or ray://host:10001; the dashboard's (8265) is neither"
            ) from None


def require_admission(address: str) -> None:
    """Returns unless a cluster turns away the token that this process has, or has not: Ray itself would try for 20 s.

    Raises:
        ConnectionError: it does.
    """
    if address.startswith(CLIENT_SCHEME) or os.environ.get("RAY_USE_TLS", "0") not in ("", "0"):
        return
    token = _token()
    import grpc

    metadata = [("authorization", f"Bearer {token}")] if token else []
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            channel.unary_unary(CLUSTER_ID_METHOD)(b"", metadata=metadata, timeout=CONNECT_TIMEOUT_S)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNAUTHENTICATED:
                raise ConnectionError(
                    f"the cluster at {address} asks for a token that this process has not, as one does that ends with "
                    "the process that has started it; set RAY_AUTH_TOKEN to its token, or start one with `local`"
                ) from None


def _token() -> str:
    """The token that Ray would use: it looks in this order."""
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token
    try:
        return Path(os.environ.get("RAY_AUTH_TOKEN_PATH", TOKEN_FILE)).expanduser().read_text().strip()
    except OSError:
        return ""


def split_address(address: str) -> tuple[str, int]:
    """Host and port of host:port, [v6]:port or ray://host[:port].

    Raises:
        ValueError: it is none of them.
    """
    is_client = address.startswith(CLIENT_SCHEME)
    rest = address.removeprefix(CLIENT_SCHEME).partition("?")[0].rstrip("/")
    host, colon, port = rest.rpartition(":")
    if is_client and (not colon or rest.endswith("]")):
        host, port = rest, str(DEFAULT_CLIENT_PORT)
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(f"{address!r} is no address of a Ray cluster; give host:port or ray://host:port")
    return host, int(port)
