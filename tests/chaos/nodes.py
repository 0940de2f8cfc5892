"""A node that is lost, and one that is frozen until it wakes up too late: a cluster of three nodes and a tiny model.

A worker lies on the node, Coordinator and router do not, and another node has room. Ray is told to give a
node up in seconds; how long it takes on its own is no figure of ours.
"""

from __future__ import annotations

import json
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import ray
from deaths import with_problems
from ray._private.state import actors as actor_table
from ray.cluster_utils import Cluster
from rows import Row
from scale import Scale

from pdray import LLM, SamplingParams
from pdray.outputs import RequestOutput
from pdray.testing.simulated_nodes import simulated_nodes
from pdray.testing.tiny_model import TINY_CONFIG

TINY = TINY_CONFIG | {"max_position_embeddings": 2048}
GIVES_UP_FAST = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 4,
}
TIMEOUT_S = 120.0
MAX_AWAY_S = 20.0
NUM_TOKENS = 1500

Disturb = Callable[[Cluster, Any], Callable[[], None]]


def nodes(scale: Scale) -> list[Row]:
    """A row for each way to lose a node, each in a cluster of its own."""
    return [
        _row("a node is lost", _lose, scale),
        _row("a node is frozen, wakes up after it was given up", _freeze, scale),
        _row("a node is lost, shutdown at once", _lose, scale, at_once=True),
    ]


def _row(name: str, disturb: Disturb, scale: Scale, *, at_once: bool = False) -> Row:
    with tempfile.TemporaryDirectory() as folder, simulated_nodes(2, 2, GIVES_UP_FAST) as cluster:
        (Path(folder) / "config.json").write_text(json.dumps(TINY))
        llm = LLM(
            model=str(Path(folder) / "config.json"),
            load_format="dummy",
            skip_tokenizer_init=True,
            device="cpu",
            num_kv_blocks=scale.num_streams * 110,
            max_num_seqs=scale.num_streams,
            worker_num_cpus=1,
            restart_backoff_s=0.5,
        )
        try:
            return _measured(name, llm, cluster, disturb, scale.num_streams, at_once=at_once)
        finally:
            llm.shutdown()


def _measured(
    name: str,
    llm: LLM,
    cluster: Cluster,
    disturb: Disturb,
    num_streams: int,
    *,
    at_once: bool,
) -> Row:
    prompts: list[Any] = [[index % 90 + 1] * 20 for index in range(num_streams)]
    params = [
        SamplingParams(temperature=1.0, seed=i, max_tokens=NUM_TOKENS, ignore_eos=True) for i in range(num_streams)
    ]
    expected = llm.generate(prompts, params, use_tqdm=False)
    home, lost, kept = _where(llm)
    found: list[list[RequestOutput]] = []
    asking = threading.Thread(target=lambda: found.append(llm.generate(prompts, params, use_tqdm=False)), daemon=True)
    if not at_once:
        asking.start()
        time.sleep(1.0)
    node = next(node for node in cluster.list_all_nodes() if node.node_id == home)
    since = time.monotonic()
    wake = disturb(cluster, node)
    if at_once:
        llm.shutdown()
        took = time.monotonic() - since
        ok = took < 60.0
        return Row(name, f"LLM.shutdown() returned after {took:.1f} s", "it returns, without an error", ok)
    clear = _wait(lambda: not _alive(home), since)
    away = _wait(lambda: _whole(llm, lost), since) - clear
    wake()
    asking.join(TIMEOUT_S)
    problems = [] if found else ["the streams did not end"]
    for outputs in found:
        same = [a.outputs[0].token_ids == b.outputs[0].token_ids for a, b in zip(outputs, expected, strict=True)]
        problems += [f"{same.count(False)} streams differ"] if not all(same) else []
    problems += [f"worker {pid} was replaced" for pid in kept - _pids(llm)]
    problems += _in_use(llm)
    problems += [f"whole only {away:.1f} s later"] if away > MAX_AWAY_S else []
    figure = f"Ray gave it up after {clear:.1f} s; whole {away:.1f} s later, on another node; {num_streams} streams"
    limit = "every stream the same, token for token; whole in 20 s; nothing in use"
    return Row(name, with_problems(figure, problems), limit, not problems)


def _lose(cluster: Cluster, node: Any) -> Callable[[], None]:
    """All of its processes die at once."""
    cluster.remove_node(node, allow_graceful=False)
    return lambda: None


def _freeze(cluster: Cluster, node: Any) -> Callable[[], None]:
    """All of its processes stop. Returns what wakes them up."""
    frozen: list[psutil.Process] = []
    for each in (info for infos in node.all_processes.values() for info in infos):
        process = psutil.Process(each.process.pid)
        frozen += [process, *process.children(recursive=True)]
    _signal(frozen, signal.SIGSTOP)
    return lambda: _signal(frozen, signal.SIGCONT)


def _signal(processes: list[psutil.Process], signal_number: signal.Signals) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal_number)


def _where(llm: LLM) -> tuple[str, set[int], set[int]]:
    """A node that has workers, and not the Coordinator; the pids of its workers, and of the others."""
    assert llm._coordinator is not None
    coordinator = actor_table(llm._coordinator._actor._actor_id.hex())["Address"]["NodeID"]
    view = llm._run(llm._coordinator.watch(-1))
    home = next(info.node_id for info in view.workers if info.node_id != coordinator)
    return (
        home,
        {info.pid for info in view.workers if info.node_id == home},
        {info.pid for info in view.workers if info.node_id != home},
    )


def _alive(node_id: str) -> bool:
    return any(node["NodeID"] == node_id and node["Alive"] for node in ray.nodes())


def _whole(llm: LLM, without: set[int]) -> bool:
    state = llm.status()
    return state["state"] == "serving" and without.isdisjoint(row.get("pid", 0) for row in state["workers"])


def _pids(llm: LLM) -> set[int]:
    return {row.get("pid", 0) for row in llm.status()["workers"]}


def _in_use(llm: LLM) -> list[str]:
    rows = llm.status()["workers"]
    return [f"{row['worker_id']}: blocks in use" for row in rows if row["free_blocks"] != row["num_blocks"] - 1]


def _wait(condition: Callable[[], bool], since: float) -> float:
    """Seconds from then until it holds.

    Raises:
        TimeoutError: it does not within TIMEOUT_S.
    """
    while not condition():
        if time.monotonic() - since > TIMEOUT_S:
            raise TimeoutError(f"{condition} did not hold within {TIMEOUT_S:g} s")
        time.sleep(0.1)
    return time.monotonic() - since
