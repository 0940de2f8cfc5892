"""What `pdray status` shows of applications, their workers and their channels."""

from __future__ import annotations

from typing import Any

import pytest

from pdray.cluster_commands import format_status
from pdray.engine.pipeline.pipeline import PipelineState
from pdray.engine.request import SplitState
from pdray.ranks.facts import RankState


def test_status_table() -> None:
    worker = {"worker_id": "decode-0", "role": "decode", "device": "cpu", "pid": 41, "running": 2, "waiting": 0}
    worker |= {"queued_tokens": 7, "free_blocks": 90, "num_blocks": 100, "leases": [{"state": "RUNNING"}] * 3}
    application = {
        "name": "pdray",
        "model": "tiny",
        "mode": "disaggregated",
        "workers": [
            worker,
            {"worker_id": "prefill-0", "role": "prefill", "device": "cpu", "pid": 40, "free_blocks": 5},
        ],
        "routers": [{"router_id": "router-a", "queue_depth": 4}],
    }
    lines = format_status([application]).splitlines()
    assert lines[0] == "pdray tiny disaggregated"
    header, decode, prefill = (line.split() for line in lines[1:4])
    titles = "worker role device running waiting queued tokens free blocks blocks leases pid"
    assert " ".join(header) == titles
    assert decode == ["decode-0", "decode", "cpu", "2", "0", "7", "90", "100", "3", "41"]
    assert prefill == ["prefill-0", "prefill", "cpu", "-", "-", "-", "5", "-", "-", "40"]
    assert lines[4] == "router router-a: queue depth 4"
    lease = {"request_id": "r1", "attempt": 2, "state": "quarantine", "router_id": "router-a", "num_blocks": 3}
    worker["leases"] = [lease | {"prefill_worker_id": "prefill-0", "expires_in_s": 4.25}]
    application["integrity"] = {"decode-0": [], "prefill-0": ["block 3 is lost"]}
    listed = format_status([application], leases=True).splitlines()[5:]
    assert listed[:2] == ["integrity decode-0: ok", "integrity prefill-0: block 3 is lost"]
    assert listed[-1].split() == ["r1", "2", "quarantine", "router-a", "prefill-0", "3", "decode-0", "4.2", "s"]
    assert format_status([]) == "no pdray application is running"


def test_status_says_what_each_rank_holds() -> None:
    ranks = [RankState(0, 41, 7, 3 << 30)._asdict(), RankState(1, 42, 6, 1 << 29)._asdict()]
    workers = [{"worker_id": "decode-0", "ranks": ranks}, {"worker_id": "prefill-0", "ranks": []}]
    lines = format_status([{"name": "pdray", "workers": workers}]).splitlines()
    assert [line for line in lines if line.startswith("rank")] == [
        "rank 0 of decode-0: process 41, 7 steps, 3.00 GiB",
        "rank 1 of decode-0: process 42, 6 steps, 0.50 GiB",
    ]


def test_status_says_which_channel_a_pair_has_and_why() -> None:
    worker = {"worker_id": "prefill-0", "channels": {"decode-0": "cuda_ipc", "decode-1": "object_store"}}
    worker["passed_over"] = {"decode-0": {}, "decode-1": {"cuda_ipc": "different machines", "nccl": "no NCCL"}}
    worker["sent"] = {"decode-0": {"num_puts": 3, "num_bytes": 4_500_000, "seconds": 0.2}}
    lines = format_status([{"name": "pdray", "workers": [worker]}]).splitlines()
    assert "channel prefill-0 to decode-0: cuda_ipc, 4.5 MB in 3 puts" in lines
    assert lines[-1] == (
        "channel prefill-0 to decode-1: object_store (not cuda_ipc: different machines; not nccl: no NCCL)"
    )


@pytest.mark.parametrize(
    ("decode_sms", "chunk", "unavailable", "line"),
    [
        (32, None, None, "decodes on 32 SMs, prompts on 100; 4 changes, 9 pieces"),
        (None, 512, None, "in one step of 512 tokens at most; 4 changes, 9 pieces"),
        (0, None, "old driver", "on two streams (no partitions: old driver); 4 changes, 9 pieces"),
    ],
)
def test_status_says_how_prompts_and_decodes_share_a_gpu(
    decode_sms: int | None, chunk: int | None, unavailable: str | None, line: str
) -> None:
    split = SplitState(decode_sms, chunk, 132, (16, 32), 4, 9, unavailable)
    workers = [{"worker_id": "decode-0", "split": split._asdict()}, {"worker_id": "decode-1", "split": None}]
    lines = format_status([{"name": "pdray", "workers": workers}]).splitlines()
    assert [shown for shown in lines if "split" in shown] == [f"split of decode-0: {line}"]


@pytest.mark.parametrize(
    ("state", "line"),
    [
        (("on", {"100 + 32 SMs": [2, 4, 8]}, 0, 0, False, 7, None), "100 + 32 SMs, with 2 to 8 sequences; 7"),
        (("auto", {}, 0, 0, True, 0, None), "plain steps until it is measured; 0"),
        (("auto", {}, 21, 0, False, 0, None), "plain steps, faster in 0 of 21 cases measured; 0"),
        (
            ("auto", {"two streams": [64], "64 + 68 SMs": [8, 128, 136, 256, 288]}, 21, 3, False, 9, None),
            "two streams, with 64 sequences; 64 + 68 SMs, with 8, 128 to 136, 256 to 288 sequences, faster in 3 of 21 "
            "cases measured; 9",
        ),
        (("on", {}, 0, 0, False, 0, "old driver"), "plain steps (old driver); 0"),
    ],
)
def test_status_says_how_decode_steps_are_computed(state: tuple[Any, ...], line: str) -> None:
    workers = [{"worker_id": "d-0", "decode_pipeline": PipelineState(*state)._asdict()}, {"worker_id": "d-1"}]
    lines = format_status([{"name": "pdray", "workers": workers}]).splitlines()
    assert [shown for shown in lines if "pipeline" in shown] == [f"decode pipeline of d-0: {line} pipelined steps"]
