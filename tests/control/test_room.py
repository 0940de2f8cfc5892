"""Whether workers fit into a cluster, against trying every placement; and what is said when they do not."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdray.control.room import Held, NodeRoom, Room, explain, find_room, lacking


def node(name: str, total: dict[str, float], free: dict[str, float] | None = None) -> NodeRoom:
    return NodeRoom(name, total, total if free is None else free)


def fits(demands: list[dict[str, float]], rooms: list[dict[str, float]]) -> bool:
    """Every way to put each demand on a node."""
    for choice in itertools.product(range(len(rooms)), repeat=len(demands)):
        left = [dict(room) for room in rooms]
        for demand, place in zip(demands, choice, strict=True):
            for name, amount in demand.items():
                left[place][name] = left[place].get(name, 0.0) - amount
        if all(amount >= -1e-4 for room in left for amount in room.values()):
            return True
    return False


amounts = st.dictionaries(st.sampled_from(["CPU", "GPU", "disk"]), st.sampled_from([0.25, 0.5, 1.0, 2.0]), min_size=1)
nodes = st.lists(st.tuples(amounts, st.sampled_from([0.0, 0.5, 1.0])), min_size=1, max_size=3)


@given(st.lists(amounts, min_size=1, max_size=3), nodes)
@settings(max_examples=500, deadline=None)
def test_here_and_never_are_certain(demands: list[dict[str, float]], given_nodes: Any) -> None:
    rooms = [
        node(f"n{i}", total, {name: amount * share for name, amount in total.items()})
        for i, (total, share) in enumerate(given_nodes)
    ]
    verdict = find_room(demands, rooms)
    if verdict is Room.HERE:
        assert fits(demands, [dict(each.free) for each in rooms])
    elif verdict is Room.NEVER:
        assert not fits(demands, [dict(each.total) for each in rooms])
    if len(rooms) == 1:
        assert (verdict is Room.HERE) == fits(demands, [dict(rooms[0].free)])
    if verdict is not Room.HERE:
        assert explain(demands, rooms)
    assert bool(lacking(demands, rooms)) == (verdict is Room.NEVER)


def test_room_that_former_workers_hold_is_room_after_them() -> None:
    two = [node("a", {"CPU": 2.0}, {"CPU": 0.5})]
    assert find_room([{"CPU": 1.0}], two) is Room.BUSY
    assert find_room([{"CPU": 1.0}], two, [Held("a", {"CPU": 0.25})]) is Room.BUSY
    assert find_room([{"CPU": 1.0}], two, [Held("a", {"CPU": 0.5})]) is Room.AFTER
    assert find_room([{"CPU": 1.0}], two, [Held("", {"CPU": 0.5})]) is Room.AFTER  # nobody knows where it is yet
    assert find_room([{"CPU": 1.0}], two, [Held("gone", {"CPU": 0.5})]) is Room.BUSY
    assert find_room([{"CPU": 0.5}], two, [Held("a", {"CPU": 0.5})]) is Room.HERE
    assert find_room([{"CPU": 3.0}], two, [Held("a", {"CPU": 1.5})]) is Room.NEVER


@pytest.mark.parametrize(
    ("demands", "rooms", "text"),
    [
        (
            [{"CPU": 1.0}] * 3,
            [node("a", {"CPU": 2.0})],
            "the workers need 3 CPUs and Ray's cluster has 2; lower worker_num_cpus or the numbers of workers",
        ),
        (
            [{"CPU": 3.0}],
            [node("a", {"CPU": 2.0}), node("b", {"CPU": 2.0})],
            "a worker needs 3 CPUs and Ray's largest node has 2; lower worker_num_cpus",
        ),
        (
            [{"GPU": 1.0}, {"GPU": 1.0}],
            [node("a", {"CPU": 2.0})],
            "the workers need 2 GPUs and Ray's cluster has 0; lower prefill_num_gpus, decode_num_gpus, "
            "tensor_parallel_size or the numbers of workers, or set device to cpu",
        ),
        (
            [{"CPU": 0.25}] * 2,
            [node("a", {"CPU": 2.0}, {})],
            "the workers wait for 0.5 CPUs of which 0 of 2 are free; stop what uses them, or lower worker_num_cpus or "
            "the numbers of workers",
        ),
        (
            [{"memory": 2.0 * 2**30}],
            [node("a", {"memory": 3.0 * 2**30}, {"memory": 1.25 * 2**30})],
            "the workers wait for 2 GiB memory of which 1.25 GiB of 3 GiB are free; stop what uses them, or "
            "lower memory in worker_resources",
        ),
        (
            [{"fast_disk": 1.0}],
            [node("a", {"CPU": 2.0})],
            "the workers need 1 fast_disk and Ray's cluster has 0; lower fast_disk in worker_resources",
        ),
        (
            [{"CPU": 1.0}],
            [node("a", {"CPU": 2.0}, {"CPU": 0.5}), node("b", {"CPU": 2.0}, {"CPU": 0.5})],
            "the workers wait for 1 CPUs of which 1 of 4 are free, but not on one node as each worker needs them; stop "
            "what uses them, or lower worker_num_cpus or the numbers of workers",
        ),
    ],
)
def test_the_reason_names_need_total_free_and_setting(demands: Any, rooms: Any, text: str) -> None:
    assert explain(demands, rooms) == text
