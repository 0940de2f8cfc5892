"""What one sender's death costs another, over processes of the test's own."""

from __future__ import annotations

import argparse
from typing import Any

import pytest

from pdray.bench import sender_death, transfer
from pdray.bench.pool_spec import PoolSpec
from pdray.bench.sender_death import BLOCKS, VICTIM_BLOCKS, format_death, measure_death
from pdray.bench.transfer_peers import Rate
from pdray.errors import ConfigError

SPEC = PoolSpec("receiver", 8, 2 * VICTIM_BLOCKS + 1, 1024, b"secret")


class Process:
    """Answers as a PeerProcess would; a put of the other sender takes 1 ms, 2 ms beside the victim, 500 ms when that
    one dies."""

    said: list[tuple[str, str]] = []
    sends = False  # the victim

    def __init__(self, factory: type, spec: PoolSpec, environment: dict[str, str]) -> None:
        self.name, self.environment = spec.name, environment
        self.posted: tuple[Any, ...] = ()

    def call(self, method: str, *args: Any, timeout_s: float = 0.0) -> Any:
        self.said.append((self.name, method))
        if method == "aim":
            assert len(args[0]) == VICTIM_BLOCKS
        if method != "send":
            return 4711
        assert len(args[0]) == BLOCKS and args[2] == 1
        latency = 0.002 if Process.sends else 0.001
        return Rate(10, 1, 1.0, latency, 2 * latency)

    def post(self, method: str, *args: Any) -> None:
        self.said.append((self.name, f"post {method}"))
        Process.sends |= self.name == "victim"

    def result(self, method: str, *, timeout_s: float = 0.0) -> Any:
        self.said.append((self.name, f"result {method}"))
        return Rate(10, 1, 1.0, 0.001, 0.502)

    def kill(self) -> None:
        self.said.append((self.name, "kill"))
        Process.sends = False

    def stop(self) -> None: ...


def test_the_worst_put_around_the_death_against_one_beside_the_sender(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sender_death, "PeerProcess", Process)
    monkeypatch.setattr(sender_death.time, "sleep", lambda seconds: None)
    Process.said.clear()
    death = measure_death(SPEC, [{}, {}, {}])
    assert (death.alone_ms, death.beside_ms, death.worst_ms) == pytest.approx((1.0, 2.0, 502.0))
    assert death.extra_ms == pytest.approx(500.0) and "500.00 ms more" in format_death(death)
    assert Process.said[-4:] == [
        ("other", "post send"),
        ("victim", "kill"),
        ("other", "result send"),
        ("other", "send"),
    ]
    assert [name for name, method in Process.said if method == "connect"] == ["victim", "other"]


@pytest.mark.parametrize("gpus", [["0"], ["4", "5"]])
def test_three_processes_on_one_gpu_or_two(gpus: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "visible_gpus", lambda: gpus)
    victim, other, receiver = transfer.three_environments()
    assert [each["CUDA_VISIBLE_DEVICES"] for each in (victim, other, receiver)] == [gpus[0], gpus[0], gpus[-1]]
    hosts = {each.get("NCCL_HOSTID") for each in (victim, other, receiver)}
    assert hosts == {None} if len(gpus) == 2 else len(hosts) == 3, "to NCCL, a GPU is on a host only once"


def test_without_a_gpu_it_is_refused() -> None:
    parser = argparse.ArgumentParser()
    transfer.add_arguments(parser)
    args = parser.parse_args(["--device", "cpu", "--kill-sender"])
    with pytest.raises(ConfigError, match="needs a GPU"):
        transfer._kill_sender(args, "nccl")
