"""The benchmark of prompts beside decodes, on a tiny random model: every row is there, and says what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pdray import cli
from pdray.bench import mux
from pdray.bench.mux_load import Beside, Served

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
    more = ["--input-len", "64", "--chunks", "16", "64", "--rates", "20", "40", "--rate-seconds", "0.2"]
    more += ["--rate-chunks", "32", "--served-input-len", "24", "--served-output-len", "4", "--tpot-ms", "50", "900"]
    assert cli.main([*words, *more, "--plot", str(plot), "--save-result", str(result)]) == 0
    saved = json.loads(result.read_text())
    names = ["mixed, 16", "mixed, 64", "two plain streams"]
    beside = {row["name"]: row for row in saved["beside"]}
    assert list(beside) == ["decodes alone", "prompts alone", *names]
    assert beside["decodes alone"]["prompt_rate"] == 0 and beside["prompts alone"]["gap_p50"] is None
    for name in names:
        assert 0 < beside[name]["gap_p50"] <= beside[name]["gap_p99"] <= beside[name]["gap_max"]
        assert beside[name]["prompt_rate"] > 0
    served = [(row["rate"], row["tpot_target"], row["name"]) for row in saved["served"]]
    each = [*((limit, name) for name in ("mixed, 32", names[2]) for limit in (50, 900))]
    each += [(limit, "controller") for limit in (50, 900)]
    assert served == [(rate, *row) for rate in (20, 40) for row in each]
    assert all(0 <= row["in_time"] <= 1 and 0 < row["ttft_50"] <= row["ttft_99"] for row in saved["served"])
    assert saved["config"]["sm_partition"] == "auto"
    assert plot.read_text().count("<polyline") == 3
    shown = capsys.readouterr().out
    assert shown.count("\n| mixed, ") == 2 and shown.count("| controller |") == 4


def test_what_cannot_be_measured_is_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*words, "--plot", "x.svg"]) == 2
    assert "--plot draws the second table: give --rates" in capsys.readouterr().err
    assert cli.main([*words, "--input-len", "0"]) == 2
    assert "must be above 0" in capsys.readouterr().err


def test_rows_say_what_was_measured() -> None:
    decode, prompt = Beside(8.0, 8.5, 9.0, 0.0), Beside(None, None, None, 40_000.0)
    row: Any = Beside(13.0, 17.0, 20.0, 24_000.0)
    assert mux.format_beside("x", row, decode, prompt) == "| x | 13.00 | 17.00 | 20.00 | 2.00 | 24,000 | 60% |"
    served = [Served(0.5, 0.006, 0.03), Served(0.5, 0.009, 0.03), Served(1.5, 0.006, 0.05)]
    late = mux.summary("x", 2048, 4, 8, 1000, served)
    assert late["in_time"] == pytest.approx(1 / 3) and late["longest_gap"] == 50
    assert mux.summary("x", 2048, 4, 15, 1000, served)["in_time"] == pytest.approx(2 / 3)
