"""Which channel a pair gets, and what is said where the one that was asked for cannot be."""

from __future__ import annotations

import re
from typing import Any

import pytest

from pdray.cluster.messages import WorkerInfo
from pdray.config import Config
from pdray.errors import ConfigError
from pdray.transfer.choose import choose_channel
from pdray.transfer.nccl import nccl_version
from pdray.transfer.one_gpu import one_gpu_environment


def worker(name: str, gpu: str = "", nccl: str = "22809") -> WorkerInfo:
    device = "cuda" if gpu else "cpu"
    return WorkerInfo(name, "1", "both", "", 0, 0, "", device, "f", 1, 16, 64, 8, 64, gpu, nccl if gpu else "")


CASES: list[tuple[Any, Any, str | None]] = [
    (worker("p", "A"), worker("d", "B"), None),
    (worker("p"), worker("d"), "p runs on cpu"),
    (worker("p", "A"), worker("d"), "d runs on cpu"),
    (worker("p", "A"), worker("d", "A"), "share A"),
    (worker("p", "A"), worker("d", "B", "22500"), "NCCL 22809 and d has 22500"),
    (worker("p", "A", ""), worker("d", "B"), "p has no NCCL: install"),
]


@pytest.mark.parametrize(("prefill", "decode", "obstacle"), CASES)
def test_choice(prefill: WorkerInfo, decode: WorkerInfo, obstacle: str | None) -> None:
    assert choose_channel(Config(channel="object_store"), prefill, decode) == "object_store"
    assert choose_channel(Config(), prefill, decode) == ("object_store" if obstacle else "nccl")
    if obstacle is None:
        assert choose_channel(Config(channel="nccl"), prefill, decode) == "nccl"
    else:
        with pytest.raises(ConfigError, match=re.escape(obstacle) + ".*set channel to auto or object_store"):
            choose_channel(Config(channel="nccl"), prefill, decode)


def test_one_gpu_is_for_those_who_ask_twice() -> None:
    pair = worker("p", "A"), worker("d", "A")
    assert choose_channel(Config(nccl_on_one_gpu=True), *pair) == "object_store"
    assert choose_channel(Config(nccl_on_one_gpu=True, channel="nccl"), *pair) == "nccl"
    with pytest.raises(ConfigError, match="runs on cpu"):
        choose_channel(Config(nccl_on_one_gpu=True, channel="nccl"), worker("p"), worker("d"))


def test_processes_on_one_gpu_are_two_hosts_to_nccl() -> None:
    assert one_gpu_environment("a")["NCCL_HOSTID"] != one_gpu_environment("b")["NCCL_HOSTID"]


def test_without_cupy_there_is_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "cupy.cuda", None)
    assert nccl_version() == ""
