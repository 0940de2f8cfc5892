"""Which workers share a GPU."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdray.config import Config
from pdray.control.gpu_plan import plan_gpus


def plan(**settings: Any) -> list[tuple[list[str], int | None]]:
    return [(list(bundle.shares), bundle.device_id) for bundle in plan_gpus(Config(**settings))]


def test_who_shares() -> None:
    assert plan() == [(["prefill-0"], None), (["decode-0"], None)]
    assert plan(prefill_num_gpus=0.5, decode_num_gpus=0.5) == [(["prefill-0", "decode-0"], None)]
    assert plan(num_decode_workers=2, decode_num_gpus=0.5) == [(["prefill-0"], None), (["decode-0", "decode-1"], None)]
    assert plan(mode="colocated") == [(["decode-0"], None)]
    assert plan(prefill_num_gpus=0.6, decode_num_gpus=0.5) == [(["prefill-0"], None), (["decode-0"], None)]
    halves: dict[str, Any] = {"num_prefill_workers": 2, "prefill_num_gpus": 0.5, "decode_num_gpus": 0.5}
    assert plan(**halves, num_decode_workers=2) == [
        (["prefill-0", "prefill-1"], None),
        (["decode-0", "decode-1"], None),
    ]
    assert plan(num_decode_workers=3, decode_num_gpus=1 / 3)[1] == (["decode-0", "decode-1", "decode-2"], None)


def test_a_worker_of_several_ranks_has_a_bundle_of_its_own() -> None:
    config = Config(mode="colocated", num_decode_workers=2, tensor_parallel_size=4)
    assert [(list(bundle.shares), bundle.num_gpus) for bundle in plan_gpus(config)] == [
        (["decode-0"], 4.0),
        (["decode-1"], 4.0),
    ]
    config = Config(prefill_tensor_parallel_size=2, num_decode_workers=2, decode_num_gpus=0.5)
    assert [(list(bundle.shares), bundle.num_gpus) for bundle in plan_gpus(config)] == [
        (["prefill-0"], 2.0),
        (["decode-0", "decode-1"], 1.0),
    ]


def test_named_devices() -> None:
    assert plan(prefill_device_id=1, decode_device_id=0) == [(["prefill-0"], 1), (["decode-0"], 0)]
    shared: dict[str, Any] = {"num_decode_workers": 2, "decode_num_gpus": 0.5}
    assert plan(decode_device_id=3, **shared) == [(["decode-0", "decode-1"], 3), (["prefill-0"], None)]
    assert plan(decode_device_id=[3, 2], **shared) == [(["decode-0"], 3), (["decode-1"], 2), (["prefill-0"], None)]


@given(
    st.integers(1, 4),
    st.integers(1, 4),
    st.sampled_from([0.1, 1 / 6, 1 / 3, 0.5, 0.7, 1.0]),
    st.sampled_from([0.2, 1.0]),
)
def test_everyone_has_a_place_and_no_gpu_is_too_full(p: int, d: int, prefill: float, decode: float) -> None:
    config = Config(num_prefill_workers=p, num_decode_workers=d, prefill_num_gpus=prefill, decode_num_gpus=decode)
    bundles = plan_gpus(config)
    names = [name for bundle in bundles for name in bundle.shares]
    assert sorted(names) == sorted([f"prefill-{i}" for i in range(p)] + [f"decode-{i}" for i in range(d)])
    assert all(0 < sum(bundle.shares.values()) <= bundle.num_gpus + 1e-9 <= 1 + 1e-9 for bundle in bundles)
    if prefill + decode <= 1 and p == d == 1:
        assert len(bundles) == 1


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"prefill_device_id": 0, "decode_device_id": 0}, "GPU 0 is to hold 2 GPUs' worth"),
        ({"decode_device_id": [0, 1]}, "decode_device_id names 2 GPUs for 1 decode workers"),
        ({"decode_device_id": 0, "device": "cpu"}, "device is cpu"),
        ({"decode_device_id": -1}, "greater than or equal to 0"),
    ],
)
def test_what_cannot_be(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Config(**settings)
