"""The benchmark of prompts beside decodes, on a tiny random model: every row is there, and says what was measured."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pdray import cli
from pdray.bench import mux
from pdray.bench.mux_load import Beside, Served
from pdray.bench.mux_served import Asked, arrival_times, name_of, parse_load, run_halves, summary
from pdray.bench.rows import Requests
from pdray.bench.ways import Way
from pdray.config import Config

TINY = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 211,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "eos_token_id": 2,
    "bos_token_id": 1,
}


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    model = tmp_path / "config.json"
    model.write_text(json.dumps(TINY))
    words = ["bench", "mux", str(model), "--load-format", "dummy", "--skip-tokenizer-init", "--device", "cpu"]
    return [*words, "--num-kv-blocks", "400", "--seconds", "0.1", "--num-decodes", "3", "--context", "16"]


def test_both_tables(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result, plot = tmp_path / "result.json", tmp_path / "plot.svg"
    more = ["--input-len", "64", "--chunks", "16", "64", "--compare-plain", "--serve-seconds", "0.5"]
    more += ["--serve", "24@20", "24@40:chunk32,controller50", "--served-output-len", "4", "--tpot-ms", "50", "900"]
    assert cli.main([*words, *more, "--plot", str(plot), "--save-result", str(result)]) == 0
    saved = json.loads(result.read_text())
    assert [row["name"] for row in saved["plain"]] == ["without", "with", "with", "without"]
    assert all(0 < row["gap_p50"] <= row["gap_p99"] for row in saved["plain"])
    names = ["mixed, 16", "mixed, 64", "two plain streams"]
    beside = {row["name"]: row for row in saved["beside"]}
    assert list(beside) == ["decodes alone", "prompts alone", *names]
    assert beside["decodes alone"]["prompt_rate"] == 0 and beside["prompts alone"]["gap_p50"] is None
    for name in names:
        assert 0 < beside[name]["gap_p50"] <= beside[name]["gap_p99"] <= beside[name]["gap_max"]
        assert beside[name]["prompt_rate"] > 0
    served = [(row["rate"], row["tpot_target"], row["name"]) for row in saved["served"]]
    all_rows = [*(f"mixed, {n}" for n in (128, 256, 512, 1024, 2048)), names[2], "controller"]
    assert served == [
        *((20, limit, name) for name in all_rows for limit in (50, 900)),
        *((40, limit, "mixed, 32") for limit in (50, 900)),
        (40, 50, "controller"),
    ]
    assert all(0 <= row["in_time"] <= 1 and 0 < row["ttft_50"] <= row["ttft_99"] for row in saved["served"])
    assert {row["num_requests"] for row in saved["served"]} == {16, 20}
    assert saved["config"]["sm_partition"] == "auto"
    for limit in (50, 900):
        assert plot.with_name(f"plot-{limit}ms.svg").read_text().count("<polyline") == 8
    shown = capsys.readouterr().out
    assert shown.count("\n| mixed, ") == 2 and shown.count("| controller |") == 3


def test_two_half_gpu_actors_get_the_same_arrivals(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    asked_for: list[Config] = []
    sent: list[tuple[int, list[float]]] = []

    def play(requests: Requests, arrivals: list[float]) -> list[list[float]]:
        sent.append((len(requests.prompts[0]), arrivals))
        lens = requests.output_lens
        return [[at + 0.5 + 0.01 * i for i in range(n)] for at, n in zip(arrivals, lens, strict=True)]

    @contextmanager
    def make(config: Config) -> Iterator[Way]:
        asked_for.append(config)
        yield Way(lambda prompts, params: pytest.fail("nothing is generated at once"), play)

    asked = Asked(0.5, 11, 1000.0, [15.0, 8.0])
    loads = [parse_load(text) for text in ("24@20:chunk32", "24@20:halves,chunk32", "48@10:halves")]
    model: Any = {"model": words[2], "load_format": "dummy", "skip_tokenizer_init": True, "num_kv_blocks": 401}
    config = Config(**model, mode="colocated", sm_partition="auto", device="cuda")
    rows = run_halves(config, loads, asked, make)
    (given,) = asked_for
    assert (given.mode, given.sm_partition, given.num_kv_blocks) == ("disaggregated", "off", 200)
    assert (given.prefill_num_gpus, given.decode_num_gpus) == (0.5, 0.5)
    assert given.model_dump(exclude_unset=True).keys() >= {"prefill_num_gpus", "mode", "num_kv_blocks"}
    assert [(row["input_len"], row["tpot_target"], row["in_time"]) for row in rows] == [
        *((24, 15, 1.0), (24, 8, 0.0)),
        *((48, 15, 1.0), (48, 8, 0.0)),
    ]
    assert sent[1] == (24, arrival_times(loads[1], 0.5)) and sent[3] == (48, arrival_times(loads[2], 0.5))
    assert rows[0]["tpot_50"] == pytest.approx(10) and rows[0]["ttft_50"] == 500
    assert run_halves(config, loads[:1], asked, make) == [] and len(asked_for) == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--plot", "x.svg"], "--plot draws the second table: give --serve"),
        (["--input-len", "0"], "must be above 0"),
        (["--serve", "2048"], "'2048' is not TOKENS@RATE"),
        (["--serve", "2048@0"], "with a rate above 0"),
        (["--serve", "0@1"], "'0@1' is not TOKENS@RATE"),
        (["--serve", "2048@1.2.3"], "is not TOKENS@RATE"),
        (["--serve", "2048@3x0:chunk128"], "2048@3x0:chunk128' is not TOKENS@RATE"),
        (["--serve", "2048@3x."], "is not TOKENS@RATE"),
        (["--serve", "2048@3:chunk"], "no row 'chunk'; use chunkN, smsN"),
        (["--no-beside", "--serve", "24@3:sms32"], "has a row sms32, but decodes can have (0,) SMs"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    words: list[str], given: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*words, *given]) == 2
    assert message in capsys.readouterr().err


def test_a_load_of_fewer_seconds_is_the_beginning_of_one_of_more() -> None:
    usual, short, more = (parse_load(text) for text in ("24@4", "24@4x2:chunk32", "24@4x20"))
    assert (short.rows, short.seconds, usual.seconds) == (("chunk32",), 2.0, None)
    times = arrival_times(usual, 10)
    assert len(times) == 40 and arrival_times(short, 10) == times[:8] and len(arrival_times(more, 10)) == 80


def test_rows_say_what_was_measured() -> None:
    decode, prompt = Beside(8.0, 8.5, 9.0, 0.0), Beside(None, None, None, 40_000.0)
    row: Any = Beside(13.0, 17.0, 20.0, 24_000.0)
    assert mux.format_beside("x", row, decode, prompt) == "| x | 13.00 | 17.00 | 20.00 | 2.00 | 24,000 | 60% |"
    served = [Served(0.5, 0.006, 0.03), Served(0.5, 0.009, 0.03), Served(1.5, 0.006, 0.05)]
    late = summary("x", 2048, 4, 8, 1000, served)
    assert late["in_time"] == pytest.approx(1 / 3) and late["longest_gap"] == 50
    assert summary("x", 2048, 4, 15, 1000, served)["in_time"] == pytest.approx(2 / 3)
    assert [name_of(word, 132) for word in ("chunk256", "sms32", "sms0")] == [
        *("mixed, 256", "32 + 100 SMs"),
        "two plain streams",
    ]
