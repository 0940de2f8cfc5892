"""The mixed row: tokens' times become the figures, and both ways send their requests when they are due."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pdray import cli
from pdray.bench import mixed
from pdray.bench.mixed import format_row, measure_mixed, summarize
from pdray.bench.offline import with_target
from pdray.bench.players import play_router
from pdray.bench.rows import Requests
from pdray.config import OFFLINE_TARGET_TPOT_MS, Config
from pdray.sampling_params import SamplingParams

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 211,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "eos_token_id": 2,
    "bos_token_id": 1,
}


def test_figures_leave_out_the_requests_that_filled_the_batch() -> None:
    arrivals = [0.0, 1.0, 2.0, 3.0, 4.0]
    times = [[9.0, 99.0, 199.0], *([at + 0.1, at + 0.11, at + 0.12] for at in (1.0, 2.0, 3.0)), [5.5, 5.506, 5.52]]
    row = summarize("engine", 1.0, arrivals, times)
    assert row.num_requests == 4
    assert row.ttft_p50 == pytest.approx(100) and row.ttft_p90 == pytest.approx(100 + 0.7 * 1400)
    assert row.tpot_p50 == row.tpot_p90 == pytest.approx(10)
    assert row.gap_p50 == pytest.approx(10) and row.gap_max == pytest.approx(14)
    assert row.within_15_ms == 0.75, "one came after more than a second" and row.within_8_ms == 0.0
    assert format_row(row) == "| 1 | engine | 100, 1080 | 10.00, 10.00 | 10.0, 14.0 | 75%, 0% |"


def test_every_way_gets_the_same_requests_after_a_warm_up(capsys: pytest.CaptureFixture[str]) -> None:
    calls: list[tuple[Requests, list[float]]] = []

    def play(requests: Requests, arrivals: list[float]) -> list[list[float]]:
        calls.append((requests, arrivals))
        return [[at + 0.1 * (i + 1) for i in range(n)] for at, n in zip(arrivals, requests.output_lens, strict=True)]

    rows = [measure_mixed("engine", play, 500, 20.0, 2.0, input_len=7, output_len=3) for _ in range(2)]
    assert rows[0] == rows[1] and calls[:2] == calls[2:]
    warm_up, measured = calls[0], calls[1]
    assert warm_up[1] == [0.0] * mixed.WARM_UP_REQUESTS and warm_up[0].prompts[0] != measured[0].prompts[0]
    assert len(measured[1]) == 40 and measured[1] == sorted(measured[1]) and 1 < measured[1][-1] < 2
    assert {len(prompt) for prompt in measured[0].prompts} == {7}
    assert capsys.readouterr().out.count("| 20 | engine |") == 2


def test_only_the_mixed_row_is_for_readers() -> None:
    config = Config()
    assert with_target(config, OFFLINE_TARGET_TPOT_MS).target_tpot_ms == 0
    served = with_target(config, None)
    assert served.target_tpot_ms is None and "target_tpot_ms" in served.model_fields_set, "LLM has another default"
    given = Config(target_tpot_ms=30)
    assert with_target(given, 0.0) is given and with_target(given, None) is given


def test_an_answer_of_another_length_is_no_result() -> None:
    with pytest.raises(AssertionError):
        measure_mixed("engine", lambda requests, arrivals: [[1.0]] * len(arrivals), 500, 20.0, 1.0)


def test_the_row_of_the_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(measure_mixed.__kwdefaults__, "input_len", 20)
    monkeypatch.setitem(measure_mixed.__kwdefaults__, "output_len", 6)
    config, result = tmp_path / "config.json", tmp_path / "result.json"
    config.write_text(json.dumps(CONFIG))
    words = ["bench", "offline", str(config), "--load-format", "dummy", "--skip-tokenizer-init", "--device", "cpu"]
    words += ["--rows", "mixed", "--request-rate", "30", "60", "--mixed-seconds", "0.2", "--num-kv-blocks", "64"]
    assert cli.main([*words, "--save-result", str(result)]) == 0
    rows = json.loads(result.read_text())["rows"]
    assert [(row["name"], row["way"], row["request_rate"]) for row in rows] == [
        ("mixed", "engine", 30.0),
        ("mixed", "engine", 60.0),
    ]
    assert all(row["ttft_p50"] > 0 and 0 < row["tpot_p50"] <= row["gap_p50"] <= row["gap_max"] for row in rows)


async def test_a_router_gets_requests_when_they_are_due() -> None:
    sent: list[tuple[float, list[int], int | None]] = []
    loop = asyncio.get_running_loop()
    began = loop.time()

    class Stream:
        async def __aiter__(self) -> AsyncIterator[list[Any]]:
            yield [SimpleNamespace(token_ids=[5])]
            yield [SimpleNamespace(token_ids=[6, 7])]

    class Router:
        async def submit(self, prompt: list[int], params: SamplingParams, *, request_id: str) -> Stream:
            sent.append((loop.time() - began, prompt, params.max_tokens))
            return Stream()

    router: Any = Router()
    times = await play_router(router, Requests([[1], [2]], [3, 3]), [0.0, 0.05])
    assert [len(each) for each in times] == [3, 3]
    assert [(prompt, n) for _, prompt, n in sent] == [([1], 3), ([2], 3)]
    assert sent[1][0] >= 0.05 and times[1][0] >= 0.05 and times[1] == sorted(times[1])
