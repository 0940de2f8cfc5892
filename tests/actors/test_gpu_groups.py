"""Placement on a cluster of two GPUs that are only Ray's word: who lands where, and that nothing is left behind."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.util.placement_group import placement_group_table

from pdray import LLM, SamplingParams
from pdray.actors.gpu_groups import GpuGroups
from pdray.config import Config
from pdray.errors import ModelLoadError, PdrayError, PlacementError, StartTimeoutError
from pdray.quick_ray import quick_start
from pdray.testing.patience import PATIENCE_S

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module", autouse=True)
def two_gpus() -> Iterator[None]:
    with quick_start():
        ray.init(address="local", num_cpus=2, num_gpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@ray.remote(num_cpus=0)
class Worker:
    def gpu(self) -> int:
        (gpu,) = ray.get_gpu_ids()
        return int(gpu)


def groups_left() -> list[str]:
    return [row["name"] for row in placement_group_table().values() if row["state"] != "REMOVED"]


async def start(groups: GpuGroups, *names: str) -> dict[str, tuple[Any, int]]:
    async with asyncio.timeout(PATIENCE_S):
        await groups.reserve()
        workers = {name: Worker.options(**groups.options(name)).remote() for name in names}
        return {name: (worker, await worker.gpu.remote()) for name, worker in workers.items()}


async def end(groups: GpuGroups, workers: dict[str, tuple[Any, int]]) -> None:
    for worker, _ in workers.values():
        ray.kill(worker)
    await groups.release()
    assert groups_left() == []


async def test_two_decode_workers_share_a_gpu_and_the_prefill_worker_has_the_other() -> None:
    groups = GpuGroups(Config(device="cuda", num_decode_workers=2, decode_num_gpus=0.5), "app", detached=False)
    workers = await start(groups, "decode-0", "prefill-0", "decode-1")
    gpus = {name: gpu for name, (_, gpu) in workers.items()}
    assert gpus["decode-0"] == gpus["decode-1"] != gpus["prefill-0"]
    await end(groups, workers)


@pytest.mark.parametrize(("prefill", "decode"), [(0, 1), (1, 0)])
async def test_named_gpus_are_the_ones_that_workers_get(prefill: int, decode: int) -> None:
    config = Config(
        device="cuda",
        num_decode_workers=2,
        decode_num_gpus=0.5,
        prefill_device_id=prefill,
        decode_device_id=[decode, decode],
    )
    groups = GpuGroups(config, "app", detached=True)
    workers = await start(groups, "prefill-0", "decode-0", "decode-1")
    expected = {"prefill-0": prefill, "decode-0": decode, "decode-1": decode}
    assert {name: gpu for name, (_, gpu) in workers.items()} == expected
    again = GpuGroups(config, "app", detached=True)  # as a Coordinator that was started again, while workers run
    async with asyncio.timeout(PATIENCE_S):
        await again.reserve()
    ray.kill(workers["decode-0"][0])
    workers |= await start(again, "decode-0")
    assert workers["decode-0"][1] == decode
    assert len(groups_left()) == 2
    await end(GpuGroups(config, "app", detached=True), workers)


async def test_one_named_gpu_leaves_the_other_to_whoever_comes() -> None:
    groups = GpuGroups(Config(device="cuda", decode_device_id=1), "app", detached=False)
    workers = await start(groups, "decode-0", "prefill-0")
    assert {name: gpu for name, (_, gpu) in workers.items()} == {"decode-0": 1, "prefill-0": 0}
    await end(groups, workers)


async def test_a_gpu_that_is_not_there_or_in_use_is_refused_with_a_reason() -> None:
    missing = GpuGroups(Config(device="cuda", decode_device_id=5), "app", detached=False)
    with pytest.raises(PdrayError, match=r"name GPUs \[5\].*of its 2 the free ones are \['0', '1'\]"):
        await missing.reserve()
    await missing.release()
    other = Worker.options(num_gpus=1).remote()
    taken = await other.gpu.remote()
    groups = GpuGroups(Config(device="cuda", mode="colocated", decode_device_id=taken), "app", detached=False)
    with pytest.raises(PdrayError, match=rf"\[{taken}\].*of its 2 the free ones are \['{1 - taken}'\]"):
        await groups.reserve()
    assert groups_left() == []
    ray.kill(other)
    await asyncio.sleep(0.5)
    workers = await start(groups, "decode-0")
    assert workers["decode-0"][1] == taken
    await end(groups, workers)


async def test_too_few_gpus_is_said_at_once() -> None:
    with pytest.raises(PdrayError, match="need 3 GPUs and Ray's cluster has 2"):
        await GpuGroups(Config(device="cuda", num_prefill_workers=2), "app", detached=False).reserve()
    assert groups_left() == []


async def test_a_lost_group_is_reserved_again() -> None:
    groups = GpuGroups(Config(device="cuda"), "app", detached=False)
    workers = await start(groups, "prefill-0")
    await GpuGroups(Config(device="cuda"), "app", detached=False).release()
    workers = await start(groups, "prefill-0", "decode-0")
    await end(groups, workers)


TINY = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 95,
}


def test_an_application_reserves_and_returns_its_gpus(tmp_path: Path) -> None:
    """Its workers have no CUDA, and run on CPU; Ray gives them GPUs all the same. A worker that dies is replaced."""
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    settings: dict[str, Any] = {"load_format": "dummy", "skip_tokenizer_init": True, "num_kv_blocks": 40}
    settings |= {"max_num_seqs": 4, "num_decode_workers": 2, "decode_num_gpus": 0.5, "restart_backoff_s": 0.1}
    with LLM(str(tmp_path / "config.json"), **settings) as llm:
        assert len(groups_left()) == 1
        free = ray.available_resources().get("GPU", 0)
        assert free == 0
        prompt = {"prompt_token_ids": [1, 2, 3]}
        params = SamplingParams(max_tokens=4, ignore_eos=True, seed=1)
        first = llm.generate(prompt, params, use_tqdm=False)[0].outputs[0].token_ids
        llm._run(kill_coordinator(llm))
        assert llm.generate(prompt, params, use_tqdm=False)[0].outputs[0].token_ids == first
        assert len(groups_left()) == 1
    assert groups_left() == []


def tiny(folder: Path, **settings: Any) -> dict[str, Any]:
    """Arguments of LLM for a tiny model on CPU."""
    (folder / "config.json").write_text(json.dumps(TINY))
    fixed: dict[str, Any] = {"device": "cpu", "load_format": "dummy", "skip_tokenizer_init": True, "num_kv_blocks": 40}
    return fixed | {"model": str(folder / "config.json"), "max_num_seqs": 4} | settings


def test_cpus_that_are_in_use_are_waited_for_with_a_reason(tmp_path: Path) -> None:
    other = Worker.options(num_cpus=2).remote()
    ray.get(other.__ray_ready__.remote())
    reason = r"the workers wait for 0\.5 CPUs of which 0 of 2 are free; stop what uses them, or lower worker_num_cpus"
    with pytest.raises(StartTimeoutError, match=reason), LLM(**tiny(tmp_path, worker_num_cpus=0.5, start_timeout_s=6)):
        pass
    freed = threading.Timer(3.0, ray.kill, [other])
    freed.start()
    with LLM(**tiny(tmp_path, worker_num_cpus=0.5)) as llm:  # "busy now" is no error
        params = SamplingParams(max_tokens=2, ignore_eos=True)
        assert llm.generate({"prompt_token_ids": [1]}, params, use_tqdm=False)[0].outputs[0].token_ids
        assert not freed.is_alive() and llm.status()["error"] is None


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"worker_num_cpus": 1.5}, "need 3 CPUs and Ray's cluster has 2; lower worker_num_cpus"),
        ({"worker_resources": {"nowhere": 1.0}}, "need 2 nowhere and Ray's cluster has 0; lower nowhere in worker_res"),
        (
            {"worker_resources": {"memory": 2.0**50}},
            "GiB memory and Ray's cluster has .* GiB; lower memory in worker_r",
        ),
    ],
)
def test_what_the_cluster_will_never_have_is_said_at_once(
    tmp_path: Path, settings: dict[str, Any], reason: str
) -> None:
    with pytest.raises(PlacementError, match=reason), LLM(**tiny(tmp_path, **settings)):
        pass


def test_an_error_that_stays_ends_the_start_and_keeps_its_class(tmp_path: Path) -> None:
    settings = tiny(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(TINY | {"architectures": ["Unheard"]}))
    with pytest.raises(ModelLoadError, match="Unheard"), LLM(**settings):
        pass


async def kill_coordinator(llm: LLM) -> None:
    """And wait until Ray has started it again."""
    assert llm._coordinator is not None
    ray.kill(llm._coordinator._actor, no_restart=False)
    async with asyncio.timeout(PATIENCE_S):
        while True:
            try:
                if (await llm._coordinator.describe())["state"] == "serving":
                    return
            except ray.exceptions.RayError:
                await asyncio.sleep(0.2)
