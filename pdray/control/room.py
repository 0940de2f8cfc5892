"""Whether an application's workers fit into Ray's cluster: now, once others have gone, or never; and why not. Pure.

The verdict "never" is certain: a worker larger than every node, or more of a resource than all nodes have. Whether
workers fit together is tried largest first, on the first node with room, as Ray packs them; where that fails though
another order might succeed, the verdict is that others must go first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from typing import NamedTuple

EPSILON = 1e-4  # Ray counts resources in ten-thousandths

Resources = Mapping[str, float]

SETTINGS = {
    "CPU": "worker_num_cpus or the numbers of workers",
    "GPU": "prefill_num_gpus, decode_num_gpus, tensor_parallel_size or the numbers of workers, or set device to cpu",
}


class Room(StrEnum):
    """HERE: they fit now. AFTER: they fit once the workers of former configurations have gone. BUSY: they fit once
    others have gone. NEVER: this cluster is too small."""

    HERE = "here"
    AFTER = "after"
    BUSY = "busy"
    NEVER = "never"


class NodeRoom(NamedTuple):
    """A node's resources: all of them, and the free ones."""

    node_id: str
    total: Resources
    free: Resources


class Held(NamedTuple):
    """Resources that a worker of a former configuration reserves; node_id "" if its node is not known."""

    node_id: str
    resources: Resources


def find_room(demands: Sequence[Resources], nodes: Sequence[NodeRoom], held: Sequence[Held] = ()) -> Room:
    """The verdict on the demands, one for each worker or bundle."""
    if lacking(demands, nodes):
        return Room.NEVER
    if _fit(demands, [node.free for node in nodes]):
        return Room.HERE
    if held and _fit(demands, _after(nodes, held)):
        return Room.AFTER
    return Room.BUSY


def lacking(demands: Sequence[Resources], nodes: Sequence[NodeRoom]) -> list[str]:
    """Resources of which this cluster will never have enough, as it is."""
    return [
        name
        for name in _names(demands)
        if _sum(demands, name) > _sum((node.total for node in nodes), name) + EPSILON
        or _largest(demands, name) > _largest((node.total for node in nodes), name) + EPSILON
    ]


def explain(demands: Sequence[Resources], nodes: Sequence[NodeRoom]) -> str:
    """The text for a verdict other than HERE: what is needed, what the cluster has, and which setting to change."""
    never = lacking(demands, nodes)
    if never:
        return "; ".join(_too_little(name, demands, nodes) for name in never)
    short = [
        name for name in _names(demands) if _sum(demands, name) > _sum((node.free for node in nodes), name) + EPSILON
    ]
    waited_for = short or [name for name in _names(demands)]
    parts = []
    for name in waited_for:
        total, free = (_sum((getattr(node, kind) for node in nodes), name) for kind in ("total", "free"))
        needed, total_text = _amount(name, _sum(demands, name)), _amount(name, total)
        parts.append(f"{needed} {_plural(name)} of which {_amount(name, free)} of {total_text} are free")
    where = "" if short else ", but not on one node as each worker needs them"
    return (
        f"the workers wait for {' and '.join(parts)}{where}; stop what uses them, or lower "
        f"{' and '.join(_setting(name) for name in waited_for)}"
    )


def _too_little(name: str, demands: Sequence[Resources], nodes: Sequence[NodeRoom]) -> str:
    needed, total = _sum(demands, name), _sum((node.total for node in nodes), name)
    if needed > total + EPSILON:
        return (
            f"the workers need {_amount(name, needed)} {_plural(name)} and Ray's cluster has {_amount(name, total)}; "
            f"lower {_setting(name)}"
        )
    largest, node = _largest(demands, name), _largest((node.total for node in nodes), name)
    return (
        f"a worker needs {_amount(name, largest)} {_plural(name)} and Ray's largest node has {_amount(name, node)}; "
        f"lower {_setting(name).partition(' or ')[0]}"
    )


def _setting(name: str) -> str:
    return SETTINGS.get(name, f"{name} in worker_resources")


def _plural(name: str) -> str:
    return {"CPU": "CPUs", "GPU": "GPUs"}.get(name, name)


def _amount(name: str, value: float) -> str:
    return f"{value / 2**30:.3g} GiB" if name == "memory" else f"{value:g}"


def _names(demands: Sequence[Resources]) -> list[str]:
    return sorted({name for demand in demands for name, amount in demand.items() if amount > 0})


def _sum(amounts: Iterable[Resources], name: str) -> float:
    return sum(each.get(name, 0.0) for each in amounts)


def _largest(amounts: Iterable[Resources], name: str) -> float:
    return max((each.get(name, 0.0) for each in amounts), default=0.0)


def _fit(demands: Sequence[Resources], free: Sequence[Resources]) -> bool:
    left = [dict(each) for each in free]
    for demand in sorted(demands, key=lambda each: (each.get("GPU", 0.0), each.get("CPU", 0.0)), reverse=True):
        for node in left:
            if all(node.get(name, 0.0) + EPSILON >= amount for name, amount in demand.items() if amount > 0):
                for name, amount in demand.items():
                    node[name] = node.get(name, 0.0) - amount
                break
        else:
            return False
    return True


def _after(nodes: Sequence[NodeRoom], held: Sequence[Held]) -> list[Resources]:
    """Free resources once `held` has gone. Of unknown node: counted where a node's total allows it."""
    free = {node.node_id: dict(node.free) for node in nodes}
    for each in held:
        homes = [n for n in nodes if each.node_id in (n.node_id, "")]
        for node in homes:
            room = free[node.node_id]
            after = {name: room.get(name, 0.0) + amount for name, amount in each.resources.items()}
            if all(after[name] <= node.total.get(name, 0.0) + EPSILON for name in after):
                room.update(after)
                break
    return list(free.values())
