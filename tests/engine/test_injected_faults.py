"""The faults that chaos injects into workers reach the engine as it is."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from pdray.engine import engine as engine_module
from pdray.engine.request import EngineRequest
from pdray.sampling_params import SamplingParams
from pdray.testing import patched_import

SITE = Path(__file__).parents[1] / "chaos" / "faults" / "sitecustomize.py"
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
RAISES_AT_FIRST, RAISES_LATER = 198, 197  # token ids that the tiny models have


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module that workers load, in force until the test ends."""
    monkeypatch.setattr(patched_import, "patch_when_loaded", lambda name, patch: None)
    spec = importlib.util.spec_from_file_location("chaos_faults", SITE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    by_outputs = {fault.from_outputs: fault for fault in module.FAULTS.values() if isinstance(fault.error, Exception)}
    marks = {RAISES_AT_FIRST: by_outputs[0], RAISES_LATER: by_outputs[6]}
    monkeypatch.setattr(module, "FAULTS", marks)
    monkeypatch.setattr(module, "AT_LAYER", 1)
    monkeypatch.setattr(engine_module.Engine, "_launch", engine_module.Engine._launch)
    module.patch(engine_module)
    return module


@pytest.mark.parametrize("make", ["engine", "mux"])
@pytest.mark.parametrize(("mark", "num_tokens"), [(RAISES_AT_FIRST, 0), (RAISES_LATER, 6)])
@pytest.mark.usefixtures("faults")
def test_a_marked_request_fails_at_its_place_and_no_other(llama: Any, make: str, mark: int, num_tokens: int) -> None:
    engine = getattr(llama, make)()
    for key, first in (("other", 5), ("marked", mark)):
        engine.add(EngineRequest(key, [first, 6, 7], GREEDY))
        failures = []
        while engine.has_work():
            failures += [update for update in engine.step() if update.failure is not None]
        expected = ["IndexError: index -1 is out of bounds"] if key == "marked" else []
        assert [update.failure for update in failures] == expected
    assert len(engine.tokens["marked"][0]) == num_tokens and len(engine.tokens["other"][0]) == GREEDY.max_tokens
