"""What NVIDIA's management library says of a GPU's peers, over a library of the test's own."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest

from pdray.transfer.cuda_ipc import peers


class Nvml:
    """Three GPUs; the first two can write to each other."""

    uuids = ("GPU-a", "GPU-b", "GPU-c")

    def __init__(self) -> None:
        self.num_open = 0
        self.failing = ""

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> int:
            return 999 if name == self.failing else (getattr(self, f"do_{name}")(*arguments) or 0)

        if name.startswith("do_"):
            raise AttributeError(name)
        call.__name__ = name
        return call

    def do_nvmlInit_v2(self) -> None:  # noqa: N802
        self.num_open += 1

    def do_nvmlShutdown(self) -> None:  # noqa: N802
        self.num_open -= 1

    def do_nvmlDeviceGetCount_v2(self, count: Any) -> None:  # noqa: N802
        count._obj.value = len(self.uuids)

    def do_nvmlDeviceGetHandleByIndex_v2(self, index: int, handle: Any) -> None:  # noqa: N802
        handle._obj.value = 100 + index

    def do_nvmlDeviceGetUUID(self, handle: Any, buffer: Any, size: int) -> None:  # noqa: N802
        buffer.value = self.uuids[handle.value - 100].encode()
        assert len(buffer) == size

    def do_nvmlDeviceGetP2PStatus(self, one: Any, other: Any, what: int, status: Any) -> None:  # noqa: N802
        status._obj.value = 0 if {one.value, other.value} == {100, 101} and what == 1 else 5


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Nvml:
    library = Nvml()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    return library


@pytest.mark.parametrize(("gpu", "expected"), [("a", ["b"]), ("b", ["a"]), ("c", []), ("a part of one", None)])
def test_peers(nvml: Nvml, gpu: str, expected: list[str] | None) -> None:
    assert peers.peer_gpus(gpu) == expected
    assert nvml.num_open == 0


@pytest.mark.parametrize("failing", ["nvmlInit_v2", "nvmlDeviceGetCount_v2", "nvmlDeviceGetP2PStatus"])
def test_a_library_that_fails_knows_nothing(nvml: Nvml, failing: str) -> None:
    nvml.failing = failing
    assert peers.peer_gpus("a") is None and nvml.num_open == 0


def test_without_a_driver_nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert peers.peer_gpus("a") is None
