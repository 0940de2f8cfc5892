"""The table of `pdray bench handover`, over answers of the test's own."""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pdray.bench import handover
from pdray.bench.beside import NUM_STREAMS
from pdray.config import Config
from pdray.engine.step.times import NUM_STEPS, Spread
from pdray.errors import ConfigError
from pdray.outputs import CompletionOutput, RequestOutput, RequestTimings
from pdray.sampling_params import SamplingParams


def options(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    handover.add_arguments(parser)
    return parser.parse_args(["model", *words])


def output(prompt: list[int], output_len: int, *, apart: bool, wait: float) -> RequestOutput:
    """TTFT 10 ms a token of the prompt; steps of 4 ms; apart, the first one comes later by ``wait`` and 1 ms."""
    ttft, step = 0.010 * len(prompt), 0.004
    gap = step + (wait + 0.001 if apart else 0.0)
    timings = RequestTimings(ttft=ttft, first_gap=gap, e2e=ttft + gap + step * (output_len - 2))
    if apart:
        timings.transfer_wait, timings.first_decode_step, timings.first_launch = wait, step, 0.0005
    return RequestOutput(
        "r", None, prompt, [CompletionOutput(0, token_ids=[sum(prompt)] * output_len)], True, 0, timings
    )


@pytest.fixture
def configs(monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    """What each way was made with; ways answer at once. nccl's answers are wrong."""
    made: list[Config] = []

    @contextlib.contextmanager
    def serve(config: Config) -> Iterator[Any]:
        made.append(config)
        apart, waits = config.mode == "disaggregated", iter([0.1, 0.1] + [0.002, 0.003, 0.004] * 9)

        def ask(prompt: list[int], output_len: int) -> RequestOutput:
            done = output(prompt, output_len, apart=apart, wait=next(waits))
            if config.channel == "nccl":
                done.outputs[0].token_ids[-1] += 1
            return done

        def decode(prompts: list[list[int]], params: list[SamplingParams]) -> Spread:
            """A step of 1 ms, and of 0.5 ms more if more than the streams were there."""
            assert len(prompts) == len(params) and sum(p.max_tokens > 2 for p in params) == NUM_STREAMS
            return Spread(1.0, 1.0 + 0.5 * (len(prompts) > NUM_STREAMS), 9.0)

        yield handover.Served(config.channel if apart else handover.COLOCATED, ask, decode)

    monkeypatch.setattr(handover, "serve", serve)
    return made


def test_a_row_for_each_way_and_length(configs: list[Config], tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "rows.json"
    words = ["--channels", "cuda_ipc", "--input-len", "3", "--repeat", "3", "--output-len", "6"]
    assert handover.main(options(*words, "--save-result", str(file))) == 0
    assert [(c.mode, c.channel) for c in configs] == [("colocated", "auto"), ("disaggregated", "cuda_ipc")]
    colocated, apart = (handover.Row(**row) for row in json.loads(file.read_text()))
    assert (colocated.way, colocated.transfer_wait, colocated.unexplained) == ("colocated", None, None)
    assert (colocated.ttft, colocated.first_gap, colocated.step) == pytest.approx((30, 4, 4))
    assert (apart.ttft, apart.first_gap, apart.step, apart.cost) == pytest.approx((30, 8, 4, 4)), (
        "warm-ups do not count"
    )
    assert (apart.transfer_wait, apart.first_decode_step, apart.unexplained) == pytest.approx((3, 4, 1))
    assert apart.first_launch == pytest.approx(0.5), "part of the first decode step"
    assert apart.same_answers == "3/3"
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].endswith(" | - | - | - | - | 3/3 |") and lines[3].startswith("| 3 | cuda_ipc | 30.00 | 8.00 |")


def test_steps_beside_prompts_that_are_handed_over(configs: list[Config], tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "rows.json"
    words = ["--channels", "cuda_ipc", "--input-len", "3", "--beside", "4", "--repeat", "3"]
    assert handover.main(options(*words, "--save-result", str(file))) == 0
    *_, colocated, apart = json.loads(file.read_text())
    assert (colocated["way"], apart["way"], apart["input_len"]) == ("colocated", "cuda_ipc", 4)
    assert apart["num_prompts"] == NUM_STEPS * 4 // 40, "as many as last for the streams' steps"
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"| 4 | cuda_ipc | {NUM_STEPS // 10} | 1.00 | 1.00 | 1.00 | 1.50 | **1.50** |"


def test_other_answers_than_the_colocated_ones_are_an_error(configs: list[Config]) -> None:
    assert handover.main(options("--channels", "cuda_ipc", "nccl", "--input-len", "3", "5", "--repeat", "2")) == 1
    assert len(configs) == 3


@pytest.mark.parametrize("words", [["--output-len", "2"], ["--repeat", "0"], ["--input-len", "0"], ["--beside", "0"]])
def test_options_that_cannot_work(words: list[str]) -> None:
    with pytest.raises(ConfigError):
        handover.main(options(*words))


def test_a_way_is_named_after_its_channels() -> None:
    assert handover.name_of([{"role": "both"}]) == "colocated"
    workers = [{"channels": {"decode-0": "nccl", "decode-1": "cuda_ipc"}}, {"role": "decode"}]
    assert handover.name_of(workers) == "cuda_ipc, nccl"
