"""What must hold of an LLM's prefill and decode workers and the channels between them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pdray.config import Config
from pdray.llm import LLM
from pdray.outputs import RequestOutput
from pdray.sampling_params import SamplingParams

Pair = tuple[str, str]  # ids of a prefill and a decode worker


def pairs(num_prefill_workers: int, num_decode_workers: int) -> set[Pair]:
    """Each prefill worker with each decode worker."""
    return {(f"prefill-{p}", f"decode-{d}") for p in range(num_prefill_workers) for d in range(num_decode_workers)}


def connected(state: dict[str, Any]) -> set[Pair]:
    """Pairs whose channel is open, from an application's description."""
    return {(first, second) for first, second, _ in state["pairs"]}


def sent_bytes(state: dict[str, Any]) -> dict[Pair, int]:
    """KV that each pair has moved so far; only of those that have."""
    return {
        (worker["worker_id"], peer): sent["num_bytes"]
        for worker in state["workers"]
        for peer, sent in worker.get("sent", {}).items()
    }


def in_use(state: dict[str, Any]) -> list[str]:
    """What the workers hold; nothing at rest."""
    held = []
    for worker in state["workers"]:
        if "num_blocks" not in worker:
            held.append(f"{worker['worker_id']} is {worker['state']}")
        elif worker["free_blocks"] != worker["num_blocks"] - 1 or worker["running"] or worker["waiting"]:
            held.append(f"{worker['worker_id']}: {worker['num_blocks'] - 1 - worker['free_blocks']} blocks")
        held += [f"{worker['worker_id']}: {len(leases)} leases" for leases in (worker.get("leases"),) if leases]
    return held


def node_ids(llm: LLM) -> dict[str, str]:
    """Ray's node of each worker, by worker id."""
    assert llm._coordinator is not None
    view = llm._run(llm._coordinator.watch(-1))
    return {info.worker_id: info.node_id for info in view.workers}


def requests(num_requests: int, vocabulary: range, num_tokens: int) -> tuple[list[Any], list[SamplingParams]]:
    """Prompts of 1 to 90 tokens, no two alike; greedy and seeded, every fourth with two completions."""
    prompts: list[Any] = [
        [vocabulary[(7 * i * i + 31 * j) % len(vocabulary)] for j in range(1 + 13 * i % 90)]
        for i in range(num_requests)
    ]
    params = [
        SamplingParams(temperature=i % 2, seed=i, n=1 + (i % 4 == 3), max_tokens=num_tokens, ignore_eos=True)
        for i in range(num_requests)
    ]
    return prompts, params


def tokens_of_one_engine(
    settings: dict[str, Any], prompts: list[Any], params: list[SamplingParams]
) -> list[list[list[int]]]:
    """As tokens(), computed in this process by an engine that does everything: no Ray, no router."""
    from pdray.engine.build import build_engine
    from pdray.engine.device import select_device
    from pdray.engine.request import EngineRequest
    from pdray.models import load_model

    config = Config(mode="colocated", **settings)
    device = select_device(config)
    engine = build_engine(config, load_model(config, device), device)
    said: list[list[list[int]]] = [[[] for _ in range(each.n)] for each in params]
    for key, (prompt, each) in enumerate(zip(prompts, params, strict=True)):
        engine.add(EngineRequest(key=key, prompt_token_ids=prompt, params=each, indices=tuple(range(each.n))))
    num_left = len(prompts)
    while num_left:
        for update in engine.step():
            assert isinstance(update.key, int) and update.failure is None, update
            num_left -= update.finished
            for token in update.tokens:
                said[update.key][token.index].append(token.token_id)
    return said


def tokens(outputs: Sequence[RequestOutput]) -> list[list[list[int]]]:
    """Of each completion of each request."""
    return [[completion.token_ids for completion in output.outputs] for output in outputs]
