"""Who finds the cluster that `pdray serve` has started."""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from pdray import ray_cluster
from pdray.errors import PdrayError
from pdray.ray_cluster import SharedCluster, find_shared


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PDRAY_CACHE", str(tmp_path))
    return tmp_path


def test_none() -> None:
    assert find_shared() is None


def test_a_cluster_is_shared_while_its_process_lives(cache: Path) -> None:
    mine = SharedCluster(os.getpid(), "127.0.0.1:1", "token")
    (cache / "cluster.json").write_bytes(msgspec.json.encode(mine))
    assert find_shared() == mine
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
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with pytest.raises(PdrayError) if fails else contextlib.nullcontext():
            ray_cluster.join("127.0.0.1:3")
        assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGTERM, before)
