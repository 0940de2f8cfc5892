"""A rule that the engine has never seen: it comes with its own class, and nothing else changes."""

from __future__ import annotations

from typing import Any

import pytest

from pdray.engine.grammar.matcher import Words
from pdray.engine.request import EngineRequest
from pdray.engine.schedule import rules
from pdray.engine.schedule.rule import History, Rule, set_bits
from pdray.sampling_params import SamplingParams

PROMPT = [(5 * i) % 190 for i in range(30)]


class NeverTwice(Rule):
    """Bans every token that the answer already has; asked for by an odd top_k."""

    def __init__(self, history: History) -> None:
        self.seen = set(history.output_token_ids)

    def told(self, token_id: int) -> None:
        self.seen.add(token_id)

    def narrow(self, words: Words, position: int) -> None:
        set_bits(words, self.seen, False)


@pytest.fixture
def toy_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(history: History) -> Rule | None:
        return NeverTwice(history) if history.params.top_k == 197 else None

    monkeypatch.setattr(rules, "RULES", [*rules.RULES, make])


def request(key: str, top_k: int, outputs: tuple[int, ...] = (), n: int = 1) -> EngineRequest:
    params = SamplingParams(temperature=0.2, seed=1, top_k=top_k, max_tokens=40, ignore_eos=True, n=n)
    return EngineRequest(key, PROMPT, params, indices=tuple(range(n)), output_token_ids=outputs)


@pytest.mark.parametrize("overlap", [False, True])
def test_it_is_told_every_token_and_bans_them(overlap: bool, llama: Any, toy_rule: None) -> None:
    engine = llama.engine(async_scheduling=overlap, num_kv_blocks=17)  # so few that sequences are preempted
    engine.run(request("free", 196), *(request(f"strict-{i}", 197, n=2) for i in range(3)))
    assert len(set(engine.ids("free"))) < 40, "else the rule shows nothing"
    for i in range(3):
        for index in range(2):
            assert len(set(engine.ids(f"strict-{i}", index))) == 40
    assert engine.stats().num_preemptions > 0


def test_a_replay_goes_on_as_if_nothing_had_happened(llama: Any, toy_rule: None) -> None:
    whole = llama.engine().run(request("r", 197)).ids("r")
    assert llama.engine().run(request("r", 197, tuple(whole[:17]))).ids("r") == whole[17:]
