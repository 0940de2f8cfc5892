"""The offline benchmark on tiny random models: every way gives the same tokens, and the rates are what they say."""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from pdray import cli
from pdray.bench import offline
from pdray.bench.offline import Generation, OfflineRow, format_rows, measure
from pdray.bench.rows import WORKLOADS, Requests, floor_seconds
from pdray.bench.vocabulary import make_vocabulary
from pdray.errors import ConfigError
from pdray.models.model_config import ModelConfig
from pdray.sampling_params import SamplingParams

SHAPE = {
    "vocab_size": 211,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.4,
    "rms_norm_eps": 1e-6,
    "eos_token_id": 2,
    "bos_token_id": 1,
}
MODELS = {
    "LlamaForCausalLM": {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    "Qwen2ForCausalLM": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e4}},
    "Qwen3ForCausalLM": {"rope_theta": 1e6},
}


@pytest.mark.parametrize("architecture", sorted(MODELS))
def test_engine_and_transformers_give_the_same_tokens(architecture: str, tmp_path: Path) -> None:
    model, result = tmp_path / "config.json", tmp_path / "result.json"
    model.write_text(json.dumps(SHAPE | MODELS[architecture] | {"architectures": [architecture]}))
    words = ["bench", "offline", str(model), "--load-format", "dummy", "--skip-tokenizer-init", "--device", "cpu"]
    words += ["--num-kv-blocks", "64", "--batch-size", "1", "3", "--input-len", "9", "--output-len", "12"]
    assert cli.main([*words, "--repeat", "1", "--transformers", "--save-result", str(result)]) == 0
    saved = json.loads(result.read_text())
    rows = {(row["name"], row["batch_size"]): row for row in saved["rows"]}
    assert list(rows) == [("engine", 1), ("transformers", 1), ("engine", 3), ("transformers", 3)]
    assert [row["same_answers"] for row in rows.values()] == ["1/1", "1/1", "3/3", "3/3"]
    assert saved["config"]["model"] == str(model)
    assert all(0 < row["first_token_ms"] < 1000 * row["seconds"] for row in rows.values())


def options(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    offline.add_arguments(parser)
    return parser.parse_args(words)


def test_rates_are_medians_after_the_warm_up_and_differences_are_counted() -> None:
    asked: list[list[list[int]]] = []
    seconds = iter([100.0, 4.0, 2.0, 3.0])

    def steady(prompts: list[list[int]], params: list[SamplingParams]) -> Generation:
        asked.append(prompts)
        total = next(seconds)
        return Generation(total, total / 4, [[7] * (p.max_tokens or 0) for p in params])

    def wrong(prompts: list[list[int]], params: list[SamplingParams]) -> Generation:
        return Generation(1.0, 0.5, [[7] * 10, [8] * 10])

    args = options("--input-len", "5", "--output-len", "10", "--repeat", "3")
    first, second = measure({"steady": steady, "wrong": wrong}, 2, 500, args)
    assert (first.seconds, first.first_token_ms) == (3.0, 750.0)
    assert first.output_tokens_per_s == pytest.approx(2 * 10 / 3.0)
    assert first.decode_tokens_per_s == pytest.approx(2 * 9 / 2.25)
    assert (first.same_answers, second.same_answers) == ("2/2", "1/2")
    assert len({str(prompts) for prompts in asked}) == 4  # no turn is helped by the one before
    assert {len(prompt) for prompts in asked for prompt in prompts} == {5}


def test_answers_of_another_length_are_no_result() -> None:
    def short(prompts: list[list[int]], params: list[SamplingParams]) -> Generation:
        return Generation(1.0, 0.5, [[7]])

    with pytest.raises(AssertionError, match=r"answers of \[1\] tokens"):
        measure({"short": short}, 1, 500, options())


def test_ways_take_turns_and_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    def maker(name: str) -> object:
        @contextlib.contextmanager
        def make(_: object) -> Iterator[object]:
            def generate(prompts: list[list[int]], params: list[SamplingParams]) -> Generation:
                events.append(name)
                return Generation(1.0, 0.5, [[7] * (p.max_tokens or 0) for p in params])

            yield generate
            events.append(f"{name} closed")

        return make

    for name in ("engine", "transformers", "llm"):
        monkeypatch.setattr(offline, f"make_{name}", maker(name))
    args = options("--repeat", "1", "--transformers", "--batch-size", "2")
    rows = offline.run(offline.config_from_args(args), args)
    assert [row.name for row in rows] == ["engine", "transformers"]
    assert events == ["engine", "transformers"] * 2 + ["transformers closed", "engine closed"]


def test_named_rows_have_their_lengths_and_floors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    uniform = WORKLOADS["uniform-256"]
    first, second = uniform.requests(5000, 1), uniform.requests(5000, 2)
    assert first.output_lens == second.output_lens and first.prompts != second.prompts
    assert {len(first.prompts), len(first.output_lens)} == {256}
    assert all(100 <= n <= 1024 for n in (*map(len, first.prompts), *first.output_lens))
    model = ModelConfig.from_hf(SHAPE | {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True})
    one = Requests([[5] * 10], [3])
    layer = 48 * (6 + 2 * 2 + 6) * 8 + 3 * 48 * 96
    weight_bytes = 2 * (2 * layer + 211 * 48)
    kv_bytes = 2 * 2 * 2 * 8 * 2
    assert floor_seconds(model, one) == pytest.approx((3 * weight_bytes + kv_bytes * (11 + 12)) / 3e12)

    config = tmp_path / "config.json"
    config.write_text(json.dumps(SHAPE | {"architectures": ["LlamaForCausalLM"]}))
    words = ["bench", "offline", str(config), "--load-format", "dummy", "--skip-tokenizer-init", "--device", "cpu"]
    words += ["--num-kv-blocks", "64", "--repeat", "1", "--rows", "first-token", "--save-result", str(tmp_path / "out")]
    assert cli.main(words) == 0
    (row,) = json.loads((tmp_path / "out").read_text())["rows"]
    assert (row["name"], row["way"], row["unit"]) == ("first-token", "engine", "ms")
    assert row["figure"] == pytest.approx(1000 * row["seconds"][0]) and 0 < row["share"] < 1
    assert "| first-token | engine |" in capsys.readouterr().out


def test_a_schema_is_a_setting_of_steps(tmp_path: Path) -> None:
    """Also for a model without a tokenizer: its answers follow the schema in a made-up vocabulary."""
    assert (
        make_vocabulary(3000).pieces == make_vocabulary(3000).pieces and len(set(make_vocabulary(3000).pieces)) == 3000
    )
    assert "json" not in WORKLOADS["mixed-1x512"].settings
    config = tmp_path / "config.json"
    config.write_text(
        json.dumps(SHAPE | {"architectures": ["LlamaForCausalLM"], "vocab_size": 700, "max_position_embeddings": 1024})
    )
    words = ["bench", "offline", str(config), "--load-format", "dummy", "--skip-tokenizer-init", "--device", "cpu"]
    words += ["--num-kv-blocks", "64", "--repeat", "1", "--save-result", str(tmp_path / "out")]
    assert cli.main([*words, "--rows", "plain-1x512", "json-1x512"]) == 0
    plain, form = json.loads((tmp_path / "out").read_text())["rows"]
    assert (form["name"], form["unit"], plain["to_plain"]) == ("json-1x512", "ms a step", None)
    assert form["to_plain"] == pytest.approx(form["figure"] / plain["figure"])


def test_table_has_a_line_for_each_row() -> None:
    row = OfflineRow("engine", 8, 128, 64, 2.5, 204.8, 250.0, 123.4, "8/8")
    cells = format_rows([row]).splitlines()[1].split()
    assert " ".join(cells) == "engine 8 128 64 2.50 204.8 250.0 123.4 8/8"


@pytest.mark.parametrize("words", [["--no-engine"], ["--output-len", "1"], ["--batch-size", "0"], ["--repeat", "0"]])
def test_options_that_cannot_work(words: list[str]) -> None:
    with pytest.raises(ConfigError):
        offline.main(options(*words))
