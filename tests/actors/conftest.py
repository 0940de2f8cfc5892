"""One Ray cluster for each test file that needs one, and pairs of workers without Ray (see worker_pairs.py)."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from pdray.quick_ray import quick_start

for _name in ("worker_pairs", "smol_application"):
    _spec = importlib.util.spec_from_file_location(_name, Path(__file__).with_name(f"{_name}.py"))
    assert _spec is not None and _spec.loader is not None
    _module = sys.modules[_name] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(_module)
worker_pairs = sys.modules["worker_pairs"]


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    """A local Ray cluster of its own, with two CPUs whatever the machine has."""
    with quick_start():
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="warning")
    yield
    ray.shutdown()


@pytest.fixture(params=["object_store", "nccl", "cuda_ipc", "toy"])
async def pair(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Any]:
    """Two workers over the real object store's half, over the nccl or cuda_ipc channel with a fake device under it, or
    over a channel kind that only this fixture knows."""
    if request.param == "toy":
        monkeypatch.setattr("pdray.transfer.registry.KINDS", {"toy": "toy_kind:ToyKind"})
    if request.param == "nccl":
        monkeypatch.setattr("pdray.actors.assembly.load_kind", lambda name: worker_pairs.host_kind)
    if request.param == "cuda_ipc":
        monkeypatch.setattr("pdray.actors.assembly.load_kind", lambda name: worker_pairs.host_memory_kind)
    channel = "auto" if request.param == "toy" else request.param
    pair = worker_pairs.Pair(worker_pairs.make_config(tmp_path, channel))
    await pair.start()
    yield pair
    await pair.stop()
