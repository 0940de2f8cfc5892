"""Which channel a pair gets, and what is said where the one that was asked for cannot be."""

from __future__ import annotations

import re
from typing import Any

import pytest
from pydantic import ValidationError

from pdray.config import Config
from pdray.errors import ConfigError
from pdray.testing.one_gpu import one_gpu_environment
from pdray.transfer.nccl.transport import nccl_version
from pdray.transfer.registry import KINDS, choose_kind, load_kind
from pdray.wire.cluster_view import WorkerInfo


def worker(name: str, gpu: str = "", nccl: str = "22809", host: str = "") -> WorkerInfo:
    device = "cuda" if gpu else "cpu"
    facts = {"gpu": gpu, "version": nccl, "host": host} if gpu else {}
    return WorkerInfo(name, "1", "both", "", 0, 0, "", device, "f", 1, 16, 64, 8, 64, {"nccl": facts})


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
    assert choose_kind("object_store", prefill, decode) == "object_store"
    assert choose_kind("auto", prefill, decode) == ("object_store" if obstacle else "nccl")
    if obstacle is None:
        assert choose_kind("nccl", prefill, decode) == "nccl"
    else:
        with pytest.raises(ConfigError, match=re.escape(obstacle) + ".*set channel to auto or object_store"):
            choose_kind("nccl", prefill, decode)


def test_two_hosts_to_nccl_may_share_a_gpu() -> None:
    assert choose_kind("nccl", worker("p", "A", host="p"), worker("d", "A", host="d")) == "nccl"
    with pytest.raises(ConfigError, match="share A"):
        choose_kind("nccl", worker("p", "A", host="p"), worker("d", "A", host="p"))


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_is_where_the_registry_says(name: str) -> None:
    assert load_kind(name).name == name and Config(channel=name).channel == name


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValidationError, match="auto|nccl"):
        Config(channel="pigeon")


def test_processes_on_one_gpu_are_two_hosts_to_nccl() -> None:
    assert one_gpu_environment("a")["NCCL_HOSTID"] != one_gpu_environment("b")["NCCL_HOSTID"]


def test_without_cupy_there_is_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "cupy.cuda", None)
    assert nccl_version() == ""
