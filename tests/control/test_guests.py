"""Who computes in whose memory, by the configuration."""

from __future__ import annotations

from typing import Any

import pytest

from pdray.config import Config
from pdray.control.guests import lent_share, plan_guests, why_no_guest
from pdray.control.membership import Membership
from pdray.wire.cluster_view import WorkerInfo

HALVES: dict[str, Any] = {"prefill_num_gpus": 0.5, "decode_num_gpus": 0.5}


@pytest.mark.parametrize(
    ("settings", "guests"),
    [
        ({}, []),
        (HALVES, ["prefill-0"]),
        (HALVES | {"channel": "shared"}, ["prefill-0"]),
        (HALVES | {"channel": "cuda_ipc"}, []),
        (HALVES | {"device": "cpu"}, []),
        (HALVES | {"device": "cuda"}, ["prefill-0"]),
        (HALVES | {"num_decode_workers": 2, "decode_num_gpus": 0.25}, []),
        ({"num_prefill_workers": 2, "prefill_num_gpus": 0.25, "decode_num_gpus": 0.5}, ["prefill-0", "prefill-1"]),
        ({"num_prefill_workers": 2, "prefill_num_gpus": 0.5, "decode_num_gpus": 0.5}, []),
        ({"num_prefill_workers": 2, "prefill_num_gpus": 0.4, "decode_num_gpus": 0.5}, []),
        (HALVES | {"prefill_device_id": 0, "decode_device_id": 1}, []),
        (HALVES | {"num_prefill_workers": 2, "prefill_device_id": [0, 1], "decode_device_id": 1}, ["prefill-1"]),
        ({"channel": "shared", "device": "cpu", "num_prefill_workers": 2}, ["prefill-0", "prefill-1"]),
    ],
    ids=str,
)
def test_guests_are_those_that_share_the_only_decode_workers_device(
    settings: dict[str, Any], guests: list[str]
) -> None:
    config = Config(**settings)
    assert plan_guests(config) == dict.fromkeys(guests, "decode-0")
    assert lent_share(config, "decode-0") == len(guests) * config.prefill_num_gpus
    assert lent_share(config, "decode-1") == 0


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"num_decode_workers": 2}, "there are 2 decode workers"),
        ({}, "decode-0 is on another device"),
        ({"device": "cpu"}, "on CPU it must be asked for"),
        (HALVES, "decode-0 lends nothing"),
    ],
    ids=str,
)
def test_the_reason_is_told(settings: dict[str, Any], why: str) -> None:
    assert why_no_guest(Config(**settings), "prefill-0") == why


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"num_decode_workers": 2, "device": "cpu"}, "num_decode_workers is 2, .*set num_decode_workers to 1"),
        ({"prefill_num_gpus": 0.6, "decode_num_gpus": 0.5}, "do not lie on one GPU; lower prefill_num_gpus"),
        (HALVES | {"prefill_device_id": 0, "decode_device_id": 1}, "do not lie on one GPU"),
        (HALVES | {"num_prefill_workers": 2, "prefill_device_id": [0, 1], "decode_device_id": 1}, "2 prefill workers"),
    ],
    ids=str,
)
def test_who_cannot_share_is_refused_where_that_is_asked_for(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=f"channel is shared, but .*{reason}"):
        Config(channel="shared", **settings)
    Config(**settings)


def info(worker_id: str, incarnation: str, lender: str = "") -> WorkerInfo:
    return WorkerInfo(worker_id, incarnation, "both", "", 0, 0, "", "", "", 8, 16, 1024, 8, 64, lender=lender)


def test_a_guest_that_has_memory_of_its_own_lives_its_own_life() -> None:
    """Its lender could lend nothing: neither waits for the other's end."""
    table = Membership(1, 1, 0.0, guests={"prefill-0": "decode-0"})
    (start,) = table.tick(0.0)
    assert start.worker_id == "decode-0" and start.lender is None  # type: ignore[union-attr]
    table.ready(decode := info("decode-0", start.incarnation))  # type: ignore[union-attr]
    (start,) = table.tick(0.0)
    assert (start.worker_id, start.lender) == ("prefill-0", decode)  # type: ignore[union-attr]
    table.ready(info("prefill-0", start.incarnation))  # type: ignore[union-attr]
    table.tick(0.0)
    table.suspect("decode-0", decode.incarnation)
    assert table.states() == {"prefill-0": "ready", "decode-0": "dying"}
    table.died(0.0, "decode-0", decode.incarnation)
    assert any(getattr(effect, "worker_id", "") == "decode-0" for effect in table.tick(0.0))
