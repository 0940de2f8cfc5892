"""Splitting SMs, with a driver that is a fake: what is asked of it, what is released when, and every reason why not."""

from __future__ import annotations

import enum
import logging
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from pdray.kernels.green_context import Partition, SmSplit, UnavailableError, open_splits, split_sms

GPU = torch.device("cuda", 0)


class Result(enum.IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_NOT_SUPPORTED = 801


class FakeDriver:
    """What cuda.bindings.driver offers, of one device.

    Args:
        fails: functions that return an error. missing: functions that the driver does not have.

    Attributes:
        log: (function, its last argument) of every call that makes or ends something.
    """

    CUdevResourceType = SimpleNamespace(CU_DEV_RESOURCE_TYPE_SM=1)
    CUgreenCtxCreate_flags = SimpleNamespace(CU_GREEN_CTX_DEFAULT_STREAM=1)
    CUstream_flags = SimpleNamespace(CU_STREAM_NON_BLOCKING=1)

    def __init__(
        self, total: int = 132, step: int = 8, version: int = 13000, fails: str = "", missing: str = "", after: int = 0
    ) -> None:
        self.total, self.step, self.version = total, step, version
        self.fails, self.missing, self.after = fails, missing, after
        self.log: list[tuple[str, Any]] = []
        self.contexts: dict[int, int] = {}  # handle -> SMs
        self.streams: dict[int, tuple[int, int]] = {}  # handle -> context, priority

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cu"):
            raise AttributeError(name)

        def call(*args: Any) -> Any:
            if name == self.missing:
                raise RuntimeError(f"Function {name} not found")
            if name == self.fails:
                self.after -= 1
                if self.after < 0:
                    return (Result.CUDA_ERROR_NOT_SUPPORTED, *[None] * 3)
            results = getattr(self, f"_{name}")(*args)
            return (Result.CUDA_SUCCESS, *(results or ()))

        call.__name__ = name
        return call

    def _cuDriverGetVersion(self) -> Any:
        return (self.version,)

    def _cuDeviceGet(self, ordinal: int) -> Any:
        return (ordinal,)

    def _cuDeviceGetDevResource(self, device: int, kind: int) -> Any:
        return (self._sms(self.total),)

    def _sms(self, count: int) -> Any:
        return SimpleNamespace(sm=SimpleNamespace(smCount=count))

    def _cuDevSmResourceSplitByCount(self, groups: int, whole: Any, flags: int, count: int) -> Any:
        given = -(-count // self.step) * self.step
        if given > whole.sm.smCount:
            return [], 0, whole
        return [self._sms(given)], 1, self._sms(whole.sm.smCount - given)

    def _cuDevResourceGenerateDesc(self, resources: list[Any], count: int) -> Any:
        assert len(resources) == count == 1
        return (resources[0],)

    def _cuGreenCtxCreate(self, description: Any, device: int, flags: int) -> Any:
        handle = 1 + len(self.log)
        self.contexts[handle] = description.sm.smCount
        self.log.append(("create", handle))
        return (handle,)

    def _cuGreenCtxStreamCreate(self, context: int, flags: int, priority: int) -> Any:
        handle = 1 + len(self.log)
        self.streams[handle] = (context, priority)
        self.log.append(("stream", handle))
        return (handle,)

    def _cuStreamSynchronize(self, stream: int) -> None:
        self.log.append(("wait", stream))

    def _cuStreamDestroy(self, stream: int) -> None:
        self.log.append(("destroy stream", stream))
        del self.streams[stream]

    def _cuGreenCtxDestroy(self, context: int) -> None:
        assert all(owner != context for owner, _ in self.streams.values()), "it still has a stream"
        self.log.append(("destroy", context))
        del self.contexts[context]


def split(driver: Any, num_sms: int = 32, device: torch.device = GPU) -> Any:
    return split_sms(device, num_sms, driver=driver, wrap=lambda handle, device: (handle, device))


def test_two_streams_on_disjoint_sms_and_a_release_in_order() -> None:
    driver = FakeDriver()
    made = split(driver)
    assert (made.first.num_sms, made.rest.num_sms, made.unavailable) == (32, 100, None)
    (first, _), (rest, _) = made.first.stream, made.rest.stream
    assert [driver.contexts[driver.streams[stream][0]] for stream in (first, rest)] == [32, 100]
    assert driver.streams[first][1] < driver.streams[rest][1], "lower numbers go first"
    driver.log.clear()
    made.close()
    made.close()
    kinds = [kind for kind, _ in driver.log]
    assert kinds == ["wait", "wait", "destroy stream", "destroy", "destroy stream", "destroy"]
    assert not driver.contexts and not driver.streams


def test_as_a_context_manager() -> None:
    driver = FakeDriver()
    with pytest.raises(KeyError), split(driver):
        raise KeyError
    assert not driver.contexts and not driver.streams


REASONS = {
    "cpu": ({}, torch.device("cpu"), 32, "cpu has no SMs to split"),
    "old driver": ({"version": 12020}, GPU, 32, r"for CUDA 12\.2, and partitions need 12\.5 or later; update it"),
    "no such function": ({"missing": "cuGreenCtxStreamCreate"}, GPU, 32, "cuGreenCtxStreamCreate failed.*update"),
    "not a multiple": ({}, GPU, 20, "hands out 24 of its 132 SMs where 20 are asked for"),
    "all": ({}, GPU, 132, r"132 of 132 SMs leave nothing for one side; ask for 1 to 131"),
    "none": ({}, GPU, 0, "0 of 132 SMs"),
    "too many": ({"total": 20}, GPU, 18, "18 of 20 SMs cannot be split off; ask for fewer"),
    "nothing left": ({"total": 16}, GPU, 12, "12 of 16 SMs cannot be split off; ask for fewer"),
} | {
    name: ({"fails": name}, GPU, 32, f"{name} failed: CUDA_ERROR_NOT_SUPPORTED")
    for name in (
        "cuDriverGetVersion",
        "cuDeviceGet",
        "cuDeviceGetDevResource",
        "cuDevSmResourceSplitByCount",
        "cuDevResourceGenerateDesc",
        "cuGreenCtxCreate",
        "cuGreenCtxStreamCreate",
    )
}


@pytest.mark.parametrize("case", REASONS)
def test_what_cannot_be_had_is_named(case: str) -> None:
    facts, device, num_sms, reason = REASONS[case]
    driver = FakeDriver(**facts)
    with pytest.raises(UnavailableError, match=reason):
        split(driver, num_sms, device)
    assert not driver.contexts and not driver.streams


@pytest.mark.parametrize("name", ["cuGreenCtxCreate", "cuGreenCtxStreamCreate"])
def test_what_was_made_before_a_failure_is_released(name: str) -> None:
    driver = FakeDriver(fails=name, after=1)
    with pytest.raises(UnavailableError, match=name):
        split(driver)
    assert [kind for kind, _ in driver.log][:2] == ["create", "stream"]
    assert not driver.contexts and not driver.streams


def test_bindings_that_are_missing_or_old_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
    with pytest.raises(UnavailableError, match=r"no cuda\.bindings .*install pdray\[cuda13\]"):
        split_sms(GPU, 32)
    monkeypatch.setitem(sys.modules, "cuda", ModuleType("cuda"))
    monkeypatch.setitem(sys.modules, "cuda.bindings", ModuleType("cuda.bindings"))
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", ModuleType("cuda.bindings.driver"))
    with pytest.raises(UnavailableError, match="older than 12.5"):
        split_sms(GPU, 32)


def test_sizes_that_can_be_had_are_kept_and_one_line_tells_of_the_others(caplog: pytest.LogCaptureFixture) -> None:
    driver = FakeDriver(total=64)
    with caplog.at_level(logging.WARNING):
        splits = open_splits(GPU, [16, 20, 32, 64], lambda device, num_sms: split(driver, num_sms, device))
    assert [(made.first.num_sms, made.rest.num_sms) for made in splits] == [(16, 48), (32, 32)]
    (line,) = [record.getMessage() for record in caplog.records]
    assert "go on with 16, 32 SMs" in line and "20 are asked for" in line and "64 of 64" in line


def test_without_partitions_there_are_plain_streams_and_one_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        (only,) = open_splits(torch.device("cpu"), [16, 32, 64])
    assert only.first.stream is None and only.rest.stream is None
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.count("cpu has no SMs to split") == 1 and "on plain streams" in line
    assert only.unavailable == "cpu has no SMs to split; only CUDA devices have"
    only.close()


def test_plain_streams_share_every_sm() -> None:
    halves = Partition(100, None), Partition(100, None)
    assert SmSplit(*halves).num_sms == 200 and SmSplit(*halves, "plain").num_sms == 100
