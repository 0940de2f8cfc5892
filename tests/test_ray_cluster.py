"""Who finds the cluster that `pdray serve` has started."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import signal
import stat
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import grpc
import msgspec
import psutil
import pytest
import ray

from pdray import ray_cluster, reachable
from pdray.errors import PdrayError
from pdray.ray_cluster import SharedCluster, find_shared, join
from pdray.reachable import CLUSTER_ID_METHOD


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PDRAY_CACHE", str(tmp_path))
    return tmp_path


def test_none() -> None:
    assert find_shared() is None


def test_a_cluster_is_shared_while_its_process_lives(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = SharedCluster(os.getpid(), "127.0.0.1:1", "token", psutil.Process().create_time())
    (cache / "cluster.json").write_bytes(msgspec.json.encode(mine))
    monkeypatch.setattr(ray_cluster, "is_reachable", lambda address: address == "127.0.0.1:1")
    assert find_shared() == mine
    other = SharedCluster(os.getpid(), "127.0.0.1:1", "token", mine.created - 60)  # its pid is this process's by now
    (cache / "cluster.json").write_bytes(msgspec.json.encode(other))
    assert find_shared() is None
    gone = SharedCluster(os.getpid(), "127.0.0.1:2", "token", mine.created)
    (cache / "cluster.json").write_bytes(msgspec.json.encode(gone))
    assert find_shared() is None
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    (cache / "cluster.json").write_bytes(msgspec.json.encode(SharedCluster(ended.pid, "127.0.0.1:1", "token")))
    assert find_shared() is None
    (cache / "cluster.json").write_text("{")
    assert find_shared() is None


def test_only_its_user_may_read_the_token(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Context:
        gcs_address = "127.0.0.1:2"

    monkeypatch.setattr(ray_cluster.ray, "init", lambda **options: None)
    monkeypatch.setattr(ray_cluster.ray, "get_runtime_context", Context)
    monkeypatch.setattr(ray_cluster, "is_reachable", lambda address: True)
    ray_cluster.start_local()
    assert find_shared() is None
    for _ in range(2):  # an older record is replaced
        ray_cluster.start_local(shared=True)
        shared = find_shared()
        assert shared is not None and shared.address == "127.0.0.1:2" and shared.token
        assert stat.S_IMODE((cache / "cluster.json").stat().st_mode) == 0o600


@pytest.mark.parametrize("fails", [False, True])
def test_rays_handler_does_not_replace_ours(monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    def init(**options: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if fails:
            raise ConnectionError("no cluster")

    monkeypatch.setattr(ray_cluster.ray, "init", init)
    monkeypatch.setattr(ray_cluster, "require_reachable", lambda address: None)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with pytest.raises(PdrayError) if fails else contextlib.nullcontext():
            ray_cluster.join("127.0.0.1:3")
        assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGTERM, before)


def never(**options: object) -> None:
    raise AssertionError("ray.init() would try for a minute and a half")


def test_an_address_where_nothing_listens_is_told_at_once(
    monkeypatch: pytest.MonkeyPatch, unused_tcp_port: int
) -> None:
    monkeypatch.setattr(ray_cluster.ray, "init", never)
    for address in (f"127.0.0.1:{unused_tcp_port}", f"ray://127.0.0.1:{unused_tcp_port}"):
        with pytest.raises(PdrayError, match=f"no Ray cluster to join at {address}: .*refused"):
            ray_cluster.join(address)
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{unused_tcp_port}")
    with pytest.raises(PdrayError, match="refused"):  # named by the environment, so no other is started in its place
        ray_cluster.join_or_start(None)


def test_another_server_at_the_address_is_no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_cluster.ray, "init", never)
    monkeypatch.setattr(reachable, "CONNECT_TIMEOUT_S", 0.5)
    with ThreadingHTTPServer(("0.0.0.0", 0), BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(PdrayError, match=r"something listens at .*, but no Ray: .*6379"):
            ray_cluster.join(f"127.0.0.1:{server.server_port}")
        server.shutdown()


class Guarded(grpc.GenericRpcHandler):
    """A cluster that lets in who has the token, as Ray's do."""

    def service(self, call: Any) -> Any:
        def answer(request: bytes, context: grpc.ServicerContext) -> bytes:
            if ("authorization", "Bearer secret") not in context.invocation_metadata():
                context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken")
            return b""

        return grpc.unary_unary_rpc_method_handler(answer) if call.method == CLUSTER_ID_METHOD else None


def test_a_cluster_that_asks_for_another_token_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray tries for 20 s, and by then another could have been started."""
    server = grpc.server(concurrent.futures.ThreadPoolExecutor(1))
    server.add_generic_rpc_handlers((Guarded(),))
    address = f"127.0.0.1:{server.add_insecure_port('0.0.0.0:0')}"
    server.start()
    joined: list[str] = []
    monkeypatch.setattr(ray, "init", lambda **options: joined.append(options["address"]))
    monkeypatch.setattr("pdray.ray_cluster.find_shared", lambda: None)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    try:
        for token in ("", "another"):
            monkeypatch.setenv("RAY_AUTH_TOKEN", token)
            with pytest.raises(PdrayError, match=r"asks for a token that this process has not.*set RAY_AUTH_TOKEN"):
                join(address)
        assert joined == []
        monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
        join(address)
        monkeypatch.delenv("RAY_AUTH_TOKEN")
        (tmp_path / "token").write_text("secret\n")
        join(address)
        # Ray writes this machine's own address for the loopback's, unless the machine has no other.
        assert [each.rpartition(":")[2] for each in joined] == [address.rpartition(":")[2]] * 2
    finally:
        server.stop(None)


@pytest.mark.parametrize("address", ["nonsense", "host:port", "127.0.0.1:0", "127.0.0.1:70000", "ray://"])
def test_what_is_no_address_is_told(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_cluster.ray, "init", never)
    with pytest.raises(PdrayError, match="address"):
        ray_cluster.join(address)


def test_local_is_nothing_to_join(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_cluster.ray, "init", never)
    with pytest.raises(PdrayError, match="`local` starts a Ray cluster"):
        ray_cluster.join("local")


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("10.0.0.1:6379", ("10.0.0.1", 6379)),
        ("[::1]:6379", ("::1", 6379)),
        ("ray://head", ("head", 10001)),
        ("ray://[::1]", ("::1", 10001)),
        ("ray://head:7000/?a=b", ("head", 7000)),
    ],
)
def test_host_and_port_of_an_address(address: str, expected: tuple[str, int]) -> None:
    assert reachable.split_address(address) == expected


def test_a_cache_that_cannot_be_written_is_told_before_ray_starts(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cache / "file").write_text("")
    monkeypatch.setenv("PDRAY_CACHE", str(cache / "file" / "below"))
    monkeypatch.setattr(ray_cluster.ray, "init", never)
    with pytest.raises(PdrayError, match=r"file/below cannot be written .*; set PDRAY_CACHE"):
        ray_cluster.start_local(shared=True)


@pytest.mark.parametrize("handler", [signal.default_int_handler, signal.SIG_DFL])
def test_sigterm_waits_until_ray_has_started(handler: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray sets a handler first of all, and starts processes only then."""
    started = False

    def rays_handler(number: int, _frame: object) -> None:
        raise SystemExit(number)

    def init(**options: object) -> None:
        nonlocal started
        ray_cluster.ray._private.utils.set_sigterm_handler(rays_handler)
        signal.raise_signal(signal.SIGTERM)
        started = True

    monkeypatch.setattr(ray_cluster.ray, "init", init)
    before = signal.signal(signal.SIGTERM, handler)
    try:
        with pytest.raises(SystemExit if handler is signal.SIG_DFL else KeyboardInterrupt):
            ray_cluster.start_local()
        assert started
        assert signal.getsignal(signal.SIGTERM) is (rays_handler if handler is signal.SIG_DFL else handler)
    finally:
        signal.signal(signal.SIGTERM, before)
