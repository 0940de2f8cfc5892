"""How an LLM starts: what it asks for, and what it does while Ray starts. Without Ray."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from pdray import LLM, llm
from pdray.errors import ModelLoadError, PdrayError
from pdray.testing.patience import PATIENCE_S


class StopHereError(PdrayError):
    """Instead of a cluster."""


def test_the_tokenizer_is_loaded_while_ray_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = threading.Event()

    def load(config: object) -> None:
        loaded.set()

    def start_ray(address: object) -> None:
        assert loaded.wait(PATIENCE_S), "nobody loads it meanwhile"
        raise StopHereError

    monkeypatch.setattr(llm, "load_tokenizer", load)
    monkeypatch.setattr(llm, "hold_ray", start_ray)
    with pytest.raises(StopHereError):
        LLM(device="cpu")


def test_a_tokenizer_that_is_not_there_ends_it_all(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = []

    class Hold:
        def release(self) -> None:
            ended.append("ray")

    class Coordinator:
        @classmethod
        async def open(cls, config: object, app_name: str, *, detached: bool) -> Coordinator:
            return cls()

        async def wait_ready(self, timeout_s: float) -> None:
            await llm.asyncio.Event().wait()

        async def stop(self) -> None:
            ended.append("coordinator")

    def load(config: object) -> None:
        raise ModelLoadError("no tokenizer")

    monkeypatch.setattr(llm, "load_tokenizer", load)
    monkeypatch.setattr(llm, "hold_ray", lambda address: Hold())
    monkeypatch.setattr(llm, "CoordinatorClient", Coordinator)
    with pytest.raises(ModelLoadError, match="no tokenizer"):
        LLM(device="cpu")
    assert ended == ["coordinator", "ray"]


@pytest.mark.parametrize(
    "given, expected", [({}, 0.0), ({"target_tpot_ms": 30}, 30.0), ({"target_tpot_ms": None}, None)]
)
def test_prompts_take_all_that_fits_unless_told_otherwise(
    given: dict[str, Any], expected: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start_ray(address: object) -> None:
        raise StopHereError

    monkeypatch.setattr(llm, "hold_ray", start_ray)
    monkeypatch.setattr(llm, "load_tokenizer", lambda config: None)
    made = object.__new__(LLM)
    with pytest.raises(StopHereError):
        made.__init__(device="cpu", **given)  # type: ignore[misc]
    assert made.config.target_tpot_ms == expected
