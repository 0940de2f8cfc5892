"""A sweep of rates: every rate is offered, a table is printed, and the plot shows what the table says."""

from __future__ import annotations

import argparse
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from pdray.bench import serve as bench_serve
from pdray.bench.plot import Series, line_plot, ticks
from pdray.bench.serving_metrics import RequestRecord, calculate_metrics
from pdray.bench.sweep import run_sweep
from pdray.errors import ConfigError

SVG = "{http://www.w3.org/2000/svg}"


def options(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    bench_serve.add_arguments(parser)
    return parser.parse_args([*words])


def saturating(capacity: float) -> Any:
    """A server that completes so many requests a second, refuses the rest, and was asked for each rate."""

    async def run(args: argparse.Namespace) -> tuple[dict[str, Any], list[RequestRecord]]:
        seconds = args.num_prompts / args.request_rate
        done = round(min(args.request_rate, capacity) * seconds)
        records = [RequestRecord(4, "ok", 200, output_len=2, ttft=0.1, itls=[0.01], e2el=0.11)] * done
        records += [RequestRecord(4, "rejected", 429)] * (args.num_prompts - done)
        result = calculate_metrics(records, seconds, {})
        return result | {"request_rate": args.request_rate, "model_id": "<tiny>"}, records

    return run


def test_a_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot = tmp_path / "goodput.svg"
    args = options("--sweep", "1", "2", "8", "--sweep-seconds", "10", "--plot", str(plot))
    results = run_sweep(args, saturating(4.0))
    assert [result["completed"] for result in results] == [10, 20, 40]
    assert [result["rejected"] for result in results] == [0, 0, 40]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[:2] for row in rows] == [["1", "1.00"], ["2", "2.00"], ["8", "4.00"]]
    root = ElementTree.parse(plot).getroot()
    offered, completed = root.iter(f"{SVG}polyline")
    last = [float(each.get("points", "").split()[-1].split(",")[1]) for each in (offered, completed)]
    bottom = max(float(line.get("y1", "")) for line in root.iter(f"{SVG}line"))
    height = [bottom - y for y in last]
    assert height[1] == pytest.approx(height[0] / 2, rel=0.05)  # y is a length from the top
    assert any(text.text == "Goodput of <tiny>" for text in root.iter(f"{SVG}text"))


@pytest.mark.parametrize("words", [("--num-prompts", "3"), ("--trace", "x.csv")])
def test_what_a_sweep_sets_by_itself(words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="--sweep"):
        run_sweep(options("--sweep", "1", *words), saturating(1.0))


@pytest.mark.parametrize("rate", ["0", "-1", "inf", "nan"])
def test_rates_that_cannot_be(rate: str) -> None:
    with pytest.raises(ConfigError, match="rates must be above 0"):
        run_sweep(options("--sweep", "1", rate), saturating(1.0))


def test_ticks_are_round_and_reach_the_highest() -> None:
    for highest in (0.0, 0.013, 0.6, 1.0, 7.2, 99.0, 12345.0):
        marks = ticks(highest)
        assert marks[0] == 0 and marks[-1] >= highest and 1 <= len(marks) <= 8
    assert ticks(6.0) == [0, 1, 2, 3, 4, 5, 6]


def test_a_line_of_nothing_is_drawn() -> None:
    assert line_plot("t", "x", "y", [Series("s", "red", [(0.0, 0.0)])]).startswith("<svg")
