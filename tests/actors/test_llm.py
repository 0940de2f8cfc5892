"""pdray.LLM over real actors with the real model: disaggregated output equals colocated output."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

import pdray
from pdray import LLM, SamplingParams
from pdray.actors.importable import why_not_importable
from pdray.errors import InvalidRequestError
from pdray.testing.patience import PATIENCE_S

COMMON: dict[str, Any] = {"device": "cpu", "max_model_len": 1024, "num_kv_blocks": 256, "max_num_batched_tokens": 256}

pytestmark = pytest.mark.ray

TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "eos_token_id": 95,
}

LONG = "The lighthouse keeper wrote in his journal every evening. " * 30
REQUESTS: list[tuple[str, SamplingParams]] = [
    ("The capital of France is", SamplingParams(temperature=0, max_tokens=24)),
    ("Once upon a time", SamplingParams(temperature=1.0, seed=7, max_tokens=32)),
    ("Once upon a time", SamplingParams(temperature=1.3, seed=8, top_k=50, top_p=0.9, max_tokens=32)),
    ("A short list of colors:", SamplingParams(temperature=0.8, seed=3, min_p=0.05, logprobs=5, max_tokens=20)),
    ("The sea is", SamplingParams(temperature=0.9, seed=11, n=3, max_tokens=16)),
    ("Count: one, two, three,", SamplingParams(temperature=0, stop=[" six", "seven"], max_tokens=32)),
    ("Water boils at", SamplingParams(temperature=0, repetition_penalty=1.3, max_tokens=24)),
    (
        "The the the the",
        SamplingParams(temperature=0.7, seed=5, presence_penalty=1.0, frequency_penalty=0.5, max_tokens=24),
    ),
    (LONG, SamplingParams(temperature=0, max_tokens=16, logprobs=0)),
    (LONG + "One day", SamplingParams(temperature=1.0, seed=42, max_tokens=16)),
    ("Hello", SamplingParams(temperature=0, max_tokens=1)),
    ("My name is", SamplingParams(temperature=1.0, seed=1, min_tokens=12, ignore_eos=True, max_tokens=12)),
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Settings of a colocated model of random weights that starts at once."""
    path: Path = tmp_path_factory.mktemp("tiny") / "config.json"
    path.write_text(json.dumps(TINY))
    settings = {"model": str(path), "load_format": "dummy", "skip_tokenizer_init": True}
    return settings | {"device": "cpu", "mode": "colocated", "num_kv_blocks": 40}


def answers(llm: LLM) -> list[Any]:
    """Everything of every completion that must not depend on who computed it."""
    outputs = llm.generate([p for p, _ in REQUESTS], [s for _, s in REQUESTS], use_tqdm=False)
    return [
        [
            (
                c.index,
                c.token_ids,
                c.text,
                c.finish_reason,
                c.stop_reason,
                None if c.logprobs is None else [sorted(step) for step in c.logprobs],
            )
            for c in output.outputs
        ]
        for output in outputs
    ]


@pytest.fixture(scope="module")
def disaggregated(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    folder = tmp_path_factory.mktemp("generation")
    (folder / "generation_config.json").write_text('{"temperature": 0.0, "max_new_tokens": 100000}')
    with LLM(mode="disaggregated", generation_config=str(folder), max_num_seqs=4, max_queue_size=1, **COMMON) as llm:
        yield llm


@pytest.fixture(scope="module")
def colocated(ray_cluster: None) -> Iterator[LLM]:
    with LLM(mode="colocated", **COMMON) as llm:
        yield llm


def blocks_in_use(llm: LLM) -> list[int]:
    """Per worker, blocks that are neither free nor merely cached; block 0 is never allocated."""
    return [worker["num_blocks"] - 1 - worker["free_blocks"] for worker in llm.status()["workers"]]


def wait_until_at_rest(llm: LLM) -> None:
    """Nothing is in use, once a probe that may be under way has ended."""
    deadline = time.monotonic() + PATIENCE_S
    while any(blocks_in_use(llm)):
        assert time.monotonic() < deadline, blocks_in_use(llm)
        time.sleep(0.1)


@pytest.fixture(scope="module")
def apart(disaggregated: LLM) -> list[Any]:
    """The first answers of the workers that are apart."""
    return answers(disaggregated)


def test_disaggregated_equals_colocated(disaggregated: LLM, colocated: LLM, apart: list[Any]) -> None:
    together = answers(colocated)
    for (prompt, _), a, b in zip(REQUESTS, apart, together, strict=True):
        assert a == b, prompt
    assert "Paris" in apart[0][0][2]
    assert len(apart[4]) == 3
    wait_until_at_rest(disaggregated)
    wait_until_at_rest(colocated)


def test_two_lanes_equal_one(ray_cluster: None, tiny: dict[str, Any]) -> None:
    """sm_partition on a CPU: lanes take turns; through router, lease and worker."""
    prompts = [[5 + (3 * i + j) % 80 for j in range(4 + 3 * i)] for i in range(12)]
    params = [SamplingParams(temperature=1.0, seed=i, max_tokens=20, ignore_eos=True) for i in range(12)]
    settings = tiny | {"max_num_batched_tokens": 16, "max_num_seqs": 8}
    said = {}
    for sm_partition in ("off", "on"):
        with LLM(**settings, sm_partition=sm_partition, decode_pipeline=sm_partition) as llm:
            outputs = llm.generate(prompts, params, use_tqdm=False)
            said[sm_partition] = [output.outputs[0].token_ids for output in outputs]
            worker = llm.status()["workers"][0]
            split, pipeline = worker["split"], worker["decode_pipeline"]
            assert (split is not None) == (pipeline is not None) == (sm_partition == "on")
            wait_until_at_rest(llm)
    assert split["num_pieces"] > 0 and "cpu has no SMs" in split["unavailable"]
    assert "cpu has no SMs" in pipeline["unavailable"]
    assert said["on"] == said["off"]


def test_two_ranks_equal_one_and_one_of_them_may_die(ray_cluster: None, tiny: dict[str, Any]) -> None:
    """Their worker ends as a whole and is replaced as a whole; its streams go on."""
    prompts = [[5 + (3 * i + j) % 80 for j in range(4 + 3 * i)] for i in range(6)]
    params = [SamplingParams(temperature=i % 2, seed=i, max_tokens=150, ignore_eos=True) for i in range(6)]
    settings = tiny | {"max_num_seqs": 8, "num_kv_blocks": 100, "restart_backoff_s": 0.1}
    with LLM(**settings) as llm:
        expected = [output.outputs[0].token_ids for output in llm.generate(prompts, params, use_tqdm=False)]
    with LLM(**settings, tensor_parallel_size=2) as llm, ThreadPoolExecutor(1) as beside:
        outputs = beside.submit(llm.generate, prompts, params, use_tqdm=False)
        (worker,) = llm.status()["workers"]
        while not worker.get("running"):
            assert not outputs.done()
            (worker,) = llm.status()["workers"]
        rank = worker["ranks"][1]["pid"]
        os.kill(rank, signal.SIGKILL)
        assert not outputs.done()
        assert [output.outputs[0].token_ids for output in outputs.result(PATIENCE_S)] == expected
        (replaced,) = llm.status()["workers"]
        assert replaced["pid"] != worker["pid"] and replaced["ranks"][1]["pid"] != rank
        assert not psutil.pid_exists(worker["pid"])
        wait_until_at_rest(llm)


def test_prefix_cache_changes_nothing(disaggregated: LLM, apart: list[Any]) -> None:
    assert answers(disaggregated) == apart
    again = disaggregated.generate([LONG], SamplingParams(temperature=0, max_tokens=4), use_tqdm=False)[0]
    assert again.num_cached_tokens > 0


def test_the_models_sampling_defaults_stand_in_for_params(disaggregated: LLM, colocated: LLM) -> None:
    assert disaggregated.get_default_sampling_params() == SamplingParams(temperature=0.0, max_tokens=100_000)
    assert colocated.get_default_sampling_params() == SamplingParams()
    prompt = "Question: What is the capital of France?\nAnswer:"
    greedy = SamplingParams(temperature=0.0, max_tokens=None)
    default, expected = (disaggregated.generate([prompt], p, use_tqdm=False)[0].outputs[0] for p in (None, greedy))
    assert default.token_ids == expected.token_ids
    sampled = colocated.generate([prompt], use_tqdm=False)[0].outputs[0]
    assert len(sampled.token_ids) <= 16


def test_timings_are_complete_and_add_up(disaggregated: LLM) -> None:
    output = disaggregated.generate(["The sun is"], SamplingParams(temperature=0, max_tokens=8), use_tqdm=False)[0]
    timings = output.timings
    for name in (
        "queue",
        "lease_wait",
        "prefill_queue",
        "prefill",
        "ttft",
        "transfer_wait",
        "first_decode_step",
        "first_launch",
        "first_gap",
        "e2e",
    ):
        value = getattr(timings, name)
        assert value is not None and value >= 0, name
    assert timings.ttft_unexplained is not None and timings.first_gap_unexplained is not None
    assert timings.ttft <= timings.e2e


def test_threads_that_generate_more_than_the_queue_holds(disaggregated: LLM) -> None:
    """A batch job waits its turn: nobody is refused."""
    prompts, params = [f"{number} plus one is" for number in range(7)], SamplingParams(temperature=0, max_tokens=3)
    alone = disaggregated.generate(prompts, params, use_tqdm=False)
    with ThreadPoolExecutor(3) as pool:
        calls = [pool.submit(disaggregated.generate, prompts, params, use_tqdm=False) for _ in range(3)]
        for call in calls:
            assert [o.outputs[0].token_ids for o in call.result()] == [o.outputs[0].token_ids for o in alone]
    wait_until_at_rest(disaggregated)


def test_bad_requests_name_value_and_limit(disaggregated: LLM) -> None:
    with pytest.raises(InvalidRequestError, match="1024"):
        disaggregated.generate([[1] * 2000], use_tqdm=False)
    with pytest.raises(InvalidRequestError, match="empty"):
        disaggregated.generate([""], use_tqdm=False)
    with pytest.raises(InvalidRequestError, match="2 sampling_params for 1"):
        disaggregated.generate(["a"], [SamplingParams(), SamplingParams()], use_tqdm=False)
    wait_until_at_rest(disaggregated)


def test_a_bad_prompt_at_the_end_is_told_before_any_is_computed(
    disaggregated: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    submitted: list[Any] = []
    assert disaggregated._router is not None
    submit = disaggregated._router.submit

    def spy(*args: Any, **kwargs: Any) -> Any:
        submitted.append(args)
        return submit(*args, **kwargs)

    monkeypatch.setattr(disaggregated._router, "submit", spy)
    params = SamplingParams(temperature=0, max_tokens=1)
    with pytest.raises(InvalidRequestError, match=r"prompts\[2\]: .*1024"):
        disaggregated.generate(["a", "b", [1] * 2000], params, use_tqdm=False)
    with pytest.raises(InvalidRequestError, match=r"prompts\[1\]: .*max_tokens is 5000"):
        disaggregated.generate(["a", "b"], [params, SamplingParams(max_tokens=5000)], use_tqdm=False)
    assert submitted == []
    output = disaggregated.generate(["a", [5, 6]], params, use_tqdm=False)
    assert [o.prompt for o in output] == ["a", None] and len(submitted) == 2


def test_chat_and_token_prompts(disaggregated: LLM) -> None:
    question = [{"role": "user", "content": "What is the capital of France?"}]
    answer = disaggregated.chat(question, SamplingParams(temperature=0, max_tokens=16), use_tqdm=False)[0]
    assert "Paris" in answer.outputs[0].text
    in_parts = [{"role": "user", "content": [{"type": "text", "text": question[0]["content"]}]}]
    again = disaggregated.chat([in_parts], SamplingParams(temperature=0, max_tokens=16), use_tqdm=False)[0]
    assert (again.prompt, again.prompt_token_ids) == (answer.prompt, answer.prompt_token_ids)
    assert disaggregated._router is not None and disaggregated._router.vocab_size == 49_152
    ids = disaggregated.tokenizer.encode("The capital of France is")
    by_text, by_ids = disaggregated.generate(
        ["The capital of France is", {"prompt_token_ids": ids}],
        SamplingParams(temperature=0, max_tokens=8),
        use_tqdm=False,
    )
    assert by_text.outputs[0].token_ids == by_ids.outputs[0].token_ids


def test_generate_starts_and_stops_its_own_actors(ray_cluster: None, tiny: dict[str, Any]) -> None:
    params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
    output = pdray.generate([[1, 2, 3]], params, use_tqdm=False, **tiny)[0]
    assert len(output.outputs[0].token_ids) == 2


def test_a_cluster_that_cannot_import_a_module_is_told(ray_cluster: None) -> None:
    problem = asyncio.run(why_not_importable("pdray_of_another_world"))
    assert problem is not None and "cannot import pdray_of_another_world" in problem and "runtime_env" in problem
    assert asyncio.run(why_not_importable()) is None


def test_a_callers_placement_group_does_not_capture_the_workers(ray_cluster: None, tiny: dict[str, Any]) -> None:
    """The group's one bundle is its actor's: what is started inside it would wait for ever for a place there."""

    class Caller:
        def answer(self, settings: dict[str, Any]) -> list[int]:
            with LLM(start_timeout_s=60, **settings) as llm:
                params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
                return list(llm.generate([[1, 2, 3]], params, use_tqdm=False)[0].outputs[0].token_ids)

    group = placement_group([{"CPU": 0.5}])
    strategy = PlacementGroupSchedulingStrategy(group, placement_group_capture_child_tasks=True)
    caller: Any = ray.remote(Caller).options(num_cpus=0.5, scheduling_strategy=strategy).remote()
    try:
        assert len(ray.get(caller.answer.remote(tiny), timeout=120)) == 4
    finally:
        ray.kill(caller)
        remove_placement_group(group)
