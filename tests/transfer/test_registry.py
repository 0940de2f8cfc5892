"""Which channel a pair gets, and what is said where the one that was asked for cannot be."""

from __future__ import annotations

import re
from typing import Any

import msgspec
import pytest
from pydantic import ValidationError

from pdray.config import Config
from pdray.errors import ConfigError
from pdray.testing.one_gpu import one_gpu_environment
from pdray.transfer.nccl.transport import nccl_version
from pdray.transfer.registry import KINDS, Choice, allowed_kinds, choose_kind, load_kind
from pdray.wire.cluster_view import WorkerInfo


def worker(name: str, gpu: str = "", nccl: str = "22809", host: str = "", **channels: dict[str, str]) -> WorkerInfo:
    device = "cuda" if gpu else "cpu"
    facts = {"gpu": gpu, "version": nccl, "host": host} if gpu else {}
    return WorkerInfo(name, "1", "both", "", 0, 0, "", device, "f", 1, 16, 64, 8, 64, {"nccl": facts} | channels)


def lender(name: str, gpu: str, peers: str = "", machine: str = "here") -> WorkerInfo:
    """A worker that can lend and borrow memory, too."""
    return worker(name, gpu, cuda_ipc={"gpu": gpu, "host": machine, "peers": peers})


def test_workers_of_several_ranks_are_joined_by_what_goes_by_the_host() -> None:
    """Also where only one of the two has several; what was asked for and cannot be is named."""
    one, two = lender("p", "A", "B"), msgspec.structs.replace(lender("d", "B"), num_ranks=2)
    for prefill, decode in ((one, two), (two, one), (two, two)):
        choice = choose_kind("auto", prefill, decode)
        assert choice.kind == "object_store" and set(choice.passed_over) == {"shared", "cuda_ipc", "nccl"}
        reason = r"[pd] has 2 ranks, and nccl joins workers of one"
        assert re.fullmatch(reason, choice.passed_over["nccl"])
        with pytest.raises(ConfigError, match=reason):
            choose_kind("nccl", prefill, decode)
    assert allowed_kinds("auto", has_ranks=True) == ["object_store"]


OWN = {"shared": "p has memory of its own (it is no guest)"}

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
    assert choose_kind("object_store", prefill, decode) == Choice("object_store", {})
    assert choose_kind("auto", prefill, decode).kind == ("object_store" if obstacle else "nccl")
    if obstacle is None:
        assert choose_kind("nccl", prefill, decode) == Choice("nccl", {})
    else:
        with pytest.raises(ConfigError, match=re.escape(obstacle) + ".*set channel to auto or object_store"):
            choose_kind("nccl", prefill, decode)


def test_two_hosts_to_nccl_may_share_a_gpu() -> None:
    assert choose_kind("nccl", worker("p", "A", host="p"), worker("d", "A", host="d")).kind == "nccl"
    with pytest.raises(ConfigError, match="share A"):
        choose_kind("nccl", worker("p", "A", host="p"), worker("d", "A", host="p"))


LENDERS: list[tuple[Any, Any, str | None]] = [
    (lender("p", "A", "B,C"), lender("d", "B"), None),
    (lender("p", "A"), lender("d", "A"), None),
    (lender("p", "A", "?"), lender("d", "B"), None),
    (lender("p", "A", "C"), lender("d", "B", "A"), "p's GPU A cannot write to d's B"),
    (lender("p", "A"), lender("d", "B"), "cannot write"),
    (lender("p", "A", "B"), lender("d", "B", machine="there"), "different machines"),
    (lender("p", "A", "B"), worker("d", "B", cuda_ipc={"cupy": ""}), "d has no cupy: install"),
    (lender("p", "A", "B"), worker("d"), "d runs on cpu"),
    (worker("p"), lender("d", "B"), "p runs on cpu"),
]


@pytest.mark.parametrize(("prefill", "decode", "obstacle"), LENDERS)
def test_memory_is_lent_where_it_can_be_written(prefill: WorkerInfo, decode: WorkerInfo, obstacle: str | None) -> None:
    """The fastest kind, and the reason why a pair has another."""
    chosen = choose_kind("auto", prefill, decode)
    if obstacle is None:
        assert chosen == Choice("cuda_ipc", OWN) and choose_kind("cuda_ipc", prefill, decode) == Choice("cuda_ipc", {})
    else:
        assert chosen.kind in ("nccl", "object_store") and obstacle in chosen.passed_over["cuda_ipc"]
        with pytest.raises(ConfigError, match=f"channel is cuda_ipc, but .*{re.escape(obstacle)}"):
            choose_kind("cuda_ipc", prefill, decode)


def test_a_kind_that_has_failed_is_passed_over() -> None:
    prefill, decode = lender("p", "A", "B"), lender("d", "B")
    failures = {"cuda_ipc": "the test write was lost"}
    assert choose_kind("auto", prefill, decode, failures) == Choice("nccl", OWN | failures)
    with pytest.raises(ConfigError, match="but the test write was lost"):
        choose_kind("cuda_ipc", prefill, decode, failures)


def test_who_computes_in_the_others_memory_has_nothing_to_send() -> None:
    """But only to that very process."""
    decode = lender("d", "A")
    guest, orphan = (msgspec.structs.replace(lender("p", "A"), lender=name) for name in (decode.incarnation, "former"))
    assert choose_kind("auto", guest, decode) == choose_kind("shared", guest, decode) == Choice("shared", {})
    with pytest.raises(ConfigError, match="p computes in the memory of former, and this is 1"):
        choose_kind("shared", orphan, decode)


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_is_where_the_registry_says(name: str) -> None:
    assert load_kind(name).name == name and Config(channel=name, device="cpu").channel == name


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValidationError, match="auto|nccl"):
        Config(channel="pigeon")


def test_processes_on_one_gpu_are_two_hosts_to_nccl() -> None:
    assert one_gpu_environment("a")["NCCL_HOSTID"] != one_gpu_environment("b")["NCCL_HOSTID"]


def test_without_cupy_there_is_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "cupy.cuda", None)
    assert nccl_version() == ""
