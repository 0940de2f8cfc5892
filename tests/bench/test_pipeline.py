"""The benchmark of pipelined decode steps, on a tiny random model: every cell that fits, and only those."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pdray import cli
from pdray.testing.tiny_model import TINY_CONFIG


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    model = tmp_path / "config.json"
    model.write_text(json.dumps(TINY_CONFIG))
    words = ["bench", "pipeline", str(model), "--load-format", "dummy", "--skip-tokenizer-init", "--device", "cpu"]
    return [*words, "--num-kv-blocks", "60", "--repetitions", "2", "--max-model-len", "400"]


def test_a_row_for_each_batch_and_context_that_fits(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = tmp_path / "result.json"
    grid = ["--batch-sizes", "5", "2", "--contexts", "32", "300", "500", "--micro-batches", "2", "3", "--splits", "16"]
    assert cli.main([*words, *grid, "--save-result", str(result)]) == 0
    saved = json.loads(result.read_text())
    assert [(row["batch_size"], row["context"]) for row in saved["rows"]] == [(2, 32), (2, 300), (5, 32)]
    for row in saved["rows"]:
        assert list(row["ms"]) == ["plain", "2: in turn", "3: in turn"]
        assert all(median > 0 and spread >= 0 for median, spread in row["ms"].values())
    assert saved["config"]["max_num_seqs"] == 5 and "torch" in saved
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "without 16 SMs for the attention: cpu has no SMs to split; only CUDA devices have"
    assert lines[1] == "| batch | context | plain ms | 2: in turn | 3: in turn |" and len(lines) == 6


def test_sizes_that_cannot_be_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("--contexts", "--repetitions"):
        assert cli.main([*words, option, "0"]) != 0
        assert f"{option} must be above 0" in capsys.readouterr().err
