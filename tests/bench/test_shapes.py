"""Shapes as they are written, their figures, and the page that comes of saved results; no server is started."""

from __future__ import annotations

import argparse
import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from pdray import cli
from pdray.bench.serving_metrics import RequestRecord
from pdray.bench.shapes import command, server
from pdray.bench.shapes.point import Limit, Point, make_point, parse_limit
from pdray.bench.shapes.report import best_table, capacity_table, goodput_plot, highest_rate, table_head, table_row
from pdray.bench.shapes.server import Server, Usage
from pdray.bench.shapes.shape import parse_shape
from pdray.errors import ConfigError, PdrayError
from pdray.options import config_values
from pdray.testing.patience import PATIENCE_S

SVG = "{http://www.w3.org/2000/svg}"
COMMON = {"model": "m.json", "device": "cpu", "load_format": "dummy", "skip_tokenizer_init": True}
LOOSE, STRICT = "1 s, 15 ms", "1 s, 8 ms"


@pytest.mark.parametrize(
    ("text", "workers", "config", "num_routers"),
    [
        ("2P3D", 5, {"mode": "disaggregated", "num_prefill_workers": 2, "num_decode_workers": 3}, 1),
        ("4C", 4, {"mode": "colocated", "num_decode_workers": 4}, 1),
        (
            "1P1D --num-routers 2 --channel nccl --no-enable-prefix-caching --worker-env A=1 B=x=y --block-size 32",
            2,
            {"channel": "nccl", "enable_prefix_caching": False, "worker_env": {"A": "1", "B": "x=y"}, "block_size": 32},
            2,
        ),
        ('1C --served-model-name one "two words"', 1, {"served_model_name": ["one", "two words"]}, 1),
        ("1C --max-model-len auto --allowed-origins '[]'", 1, {"max_model_len": None, "allowed_origins": []}, 1),
        ("1C --device cuda --max-num-batched-tokens 4096", 1, {"device": "cuda", "max_num_batched_tokens": 4096}, 1),
    ],
)
def test_a_shape_is_what_pdray_serve_is_told(text: str, workers: int, config: dict[str, Any], num_routers: int) -> None:
    shape = parse_shape(text, COMMON)
    assert (shape.num_workers, shape.num_routers) == (workers, num_routers)
    args = cli.build_parser().parse_args(["serve", *shape.serve_options()])
    told = config_values(args)
    assert told == shape.config and args.num_routers == num_routers
    assert told.items() >= config.items() and told["model"] == "m.json"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must begin with xPyD"),
        ("2P", "must begin with xPyD, as 2P2D"),
        ("0P1D", "must begin with xPyD"),
        ("4X", "must begin with xPyD"),
        ("1P1D --no-such-thing 3", "'1P1D --no-such-thing 3': unrecognized arguments: --no-such-thing 3"),
        ("1P1D --num-decode-workers 2", "says by itself what num_decode_workers is"),
        ("1P1D --api-key secret", r"set \$PDRAY_API_KEY"),
        ("1P1D --num-routers 0", "--num-routers 0 must be at least 1"),
        ("4C --max-num-seqs 0", "'4C --max-num-seqs 0': --max-num-seqs: .* greater than or equal to 1"),
        ("1P1D 'x", "cannot be read"),
    ],
)
def test_what_is_no_shape(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_shape(text, COMMON)


@pytest.mark.parametrize("text", ["1000", "1000:", "a:8", "0:8", "1000:-1", "nan:8", "1:2:3"])
def test_what_is_no_limit(text: str) -> None:
    with pytest.raises(ConfigError, match=f"limit '{text}'"):
        parse_limit(text)


def record(ttft: float, tpot: float, outcome: Any = "ok") -> RequestRecord:
    """Of 5 tokens."""
    return RequestRecord(8, outcome, output_len=5, ttft=ttft, itls=[tpot] * 4, e2el=ttft + 4 * tpot, lateness=0.002)


def test_the_figures_of_a_load() -> None:
    records = [record(0.1, 0.005), record(0.9, 0.012), record(1.1, 0.005), record(0.1, 0.005, "rejected")]
    before = Usage(1.0, 2.0, {"p → d": 1_000_000_000, "p → e": 0})
    after = Usage(1.3, 2.15, {"p → d": 4_000_000_000, "p → e": 1_000_000_000})
    limits = [parse_limit("1000:15"), parse_limit("1000:8")]
    point = make_point("1P2D", 3, 2.0, records, 2.0, before, after, limits)
    assert point.within == {LOOSE: 0.5, STRICT: 0.25}  # of all that were sent
    assert point.goodput(STRICT) == 0.5
    assert point.counts == {"ok": 3, "rejected": 1, "failed": 0}
    assert (point.router_us, point.proxy_us) == (pytest.approx(20_000), pytest.approx(10_000))  # 15 tokens
    assert point.kv_gb_per_s() == 2.0 and point.link_gb_per_s() == [0.5, 1.5]
    assert point.percentiles_ms["longest_gap"]["p99"] == pytest.approx(12, rel=0.05)
    assert point.p99_lateness_ms == pytest.approx(2.0)
    assert Point.from_dict(json.loads(json.dumps(point.to_dict()))) == point
    cells = table_row(point).count("|")
    assert cells == table_head([str(limit) for limit in limits]).splitlines()[0].count("|")


def test_a_load_without_an_answer_has_figures_too() -> None:
    nothing = Usage(0.0, 0.0, {})
    point = make_point("4C", 4, 1.0, [record(0, 0, "failed")] * 2, 1.0, nothing, nothing, [Limit(1000, 8)])
    assert point.within == {STRICT: 0.0} and point.router_us is None
    assert "| 4C | 1 | 0 / 0 / 2 | - / - / - |" in table_row(point)


def test_a_worker_that_was_replaced_under_load_spoils_the_figures() -> None:
    with pytest.raises(PdrayError, match="replaced under load .p → d"):
        make_point("1P1D", 2, 1.0, [record(1, 1)], 1.0, Usage(0, 0, {"p → d": 5}), Usage(0, 0, {"p → d": 2}), [])


def point(shape: str, num_workers: int, rate: float, loose: float, strict: float) -> Point:
    nothing = Usage(0.0, 0.0, {})
    made = make_point(shape, num_workers, rate, [record(0.1, 0.001)], 1.0, nothing, nothing, [])
    return Point.from_dict(made.to_dict() | {"within": {LOOSE: loose, STRICT: strict}})


POINTS = [
    point("1P1D", 2, 8, 1.0, 1.0),
    point("1P1D", 2, 16, 1.0, 0.8),
    point("2C", 2, 8, 1.0, 0.5),
    point("2C", 2, 16, 0.7, 0.1),
]


def test_how_much_a_shape_serves() -> None:
    assert highest_rate(POINTS[:2], STRICT) == pytest.approx(12.0)  # half-way from 100 % to 80 %
    assert highest_rate(POINTS[:2][::-1], STRICT) == pytest.approx(12.0)
    assert highest_rate(POINTS[2:], STRICT) is None
    table = capacity_table(POINTS, [LOOSE, STRICT]).splitlines()
    assert table[2] == "| 1P1D | at least 16.0 (8.0) | 12.0 (6.0) |"
    assert table[3] == "| 2C | 10.7 (5.3) | below 8 |"
    best = best_table(POINTS, [LOOSE, STRICT]).splitlines()
    assert best[2:] == ["| 8 | 1P1D, 2C (100%) | 1P1D (100%) |", "| 16 | 1P1D (100%) | 1P1D (80%) |"]


def test_the_picture_has_a_line_for_each_shape() -> None:
    root = ElementTree.fromstring(goodput_plot(POINTS, STRICT))
    assert len(list(root.iter(f"{SVG}polyline"))) == 3  # and the one of what was offered
    assert {"1P1D", "2C"} <= {text.text for text in root.iter(f"{SVG}text")}


def result(**changes: Any) -> dict[str, Any]:
    load = {"input_len": 8, "output_len": 5, "seconds": 4.0, "num_client_processes": 2, "proxy": "HAProxy"}
    whole = {"format": command.FORMAT, "date": "2026-01-02T03:04:05+00:00", "command": "pdray bench shapes ..."}
    whole |= {"device": "cpu", "load": load, "limits": [LOOSE, STRICT], "points": [p.to_dict() for p in POINTS]}
    return whole | {"left_out": ["3P1D: no time was left"]} | changes


def run(*words: str) -> int:
    return cli.main(["bench", "shapes", *words])


def test_a_page_of_saved_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.json").write_text(json.dumps(result()))
    (tmp_path / "b.json").write_text(json.dumps(result(points=[point("2P2D", 4, 16, 1.0, 1.0).to_dict()], left_out=[])))
    page = tmp_path / "page.md"
    paths = [str(tmp_path / name) for name in ("a.json", "b.json")]
    assert run("--from-results", *paths, "--page", str(page)) == 0
    text = page.read_text()
    for part in (
        "| 16 | 1P1D, 2P2D (100%) | 2P2D (100%) |",
        "3P1D: no time was left",
        "8 tokens in, 5 out",
        "2026-01-02",
    ):
        assert part in text
    pictures = [tmp_path / name for name in ("page-0.svg", "page-1.svg")]
    assert all(picture.name in text and len(ElementTree.parse(picture).getroot()) for picture in pictures)
    (tmp_path / "b.json").write_text(json.dumps(result(device="another")))
    assert run("--from-results", *paths, "--page", str(page)) == 2
    assert "differ in device" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "give --shapes and --rates"),
        (("--shapes", "1P1D", "--rates", "0"), "--rates 0: rates must be above 0"),
        (("--shapes", "1P1D", "--rates", "1", "--seconds", "0"), "--seconds 0 must be above 0"),
        (("--shapes", "1P1D", "1Q", "--rates", "1"), "shape '1Q'"),
        (("--shapes", "1P1D", "--rates", "1", "--mode", "colocated"), "leave it out of the options"),
        (("--from-results", "a.json"), "give --page"),
        (("--from-results", "no.json", "--page", "p.md"), "no.json cannot be read"),
        (("--from-results", "{other}", "--page", "p.md"), "is no result of `pdray bench shapes`"),
    ],
)
def test_mistakes_are_told_before_anything_starts(
    words: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "other.json").write_text("[]")
    assert run(*(word.format(other=tmp_path / "other.json") for word in words)) == 2
    assert message in capsys.readouterr().err


@pytest.fixture
def fake_servers(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Servers that start at once; a shape whose name is in `broken` does not start."""
    import contextlib

    from pdray.bench.sending import Sent

    world: dict[str, Any] = {"broken": (), "asked": [], "clock": 0.0}

    class FakeServer(Server):
        def state(self) -> dict[str, Any]:
            return {"model": "m", "workers": [{"worker_id": "decode-0", "role": "both", "device": "cpu"}], "pairs": []}

        def usage(self) -> Usage:
            return Usage(0.0, 0.0, {})

    @contextlib.contextmanager
    def serving(shape: Any, **_: Any) -> Any:
        if shape.name in world["broken"]:
            raise PdrayError("the server has ended")
        yield FakeServer("http://127.0.0.1:1", 1)

    def send(requests: list[Any], _target: Any, _num_processes: int) -> Sent:
        rate = len(requests) / 4.0
        world["asked"].append(rate)
        world["clock"] += 4.0
        return Sent([record(0.1, 0.005 if rate < 5 else 0.5)] * len(requests), 4.0)

    monkeypatch.setattr(command, "serving", serving)
    monkeypatch.setattr(command, "send_from_processes", send)
    monkeypatch.setattr(command.time, "monotonic", lambda: world["clock"])
    return world


LOAD = ("--seconds", "4", "--warm-up", "0", "--input-len", "4", "--output-len", "5")


def test_each_rate_is_offered_to_each_shape(fake_servers: dict[str, Any], tmp_path: Path, capsys: Any) -> None:
    fake_servers["broken"] = ("2C",)
    saved = tmp_path / "result.json"
    words = ("--shapes", "1C", "2C", "3C", "--rates", "2", "6", "8", "--stop-below", "0.5", "--save-result", str(saved))
    assert run(*words, *LOAD) == 1  # one shape did not start
    assert fake_servers["asked"] == [2.0, 6.0, 2.0, 6.0]
    kept = json.loads(saved.read_text())
    assert [(p["shape"], p["rate"]) for p in kept["points"]] == [("1C", 2), ("1C", 6), ("3C", 2), ("3C", 6)]
    assert kept["left_out"][:2] == [f"{n}C at 8 requests/s: 0% at 6 was few enough" for n in (1, 3)]
    assert kept["left_out"][2] == "2C: the server has ended"
    assert len(capsys.readouterr().out.splitlines()) == 2 + 4


def test_what_there_is_no_time_for_is_told(fake_servers: dict[str, Any], tmp_path: Path) -> None:
    saved = tmp_path / "result.json"
    words = ("--shapes", "1C", "2C", "--rates", "1", "2", "3", "--time-limit", "6", "--save-result", str(saved))
    assert run(*words, *LOAD) == 0
    assert fake_servers["asked"] == [1.0, 2.0]
    left_out = json.loads(saved.read_text())["left_out"]
    assert left_out == ["1C at 3 requests/s: no time was left", "2C: no time was left"]


def test_what_is_not_there_yet_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server answers before all of its workers are there, and would be measured without them."""
    workers = [{"worker_id": f"{role}-{n}", "role": role, "pid": 1} for role in ("prefill", "decode") for n in range(2)]
    pairs = [("prefill-0", "decode-0", 1), ("prefill-1", "decode-0", 1), ("prefill-1", "decode-1", 2)]
    state = {"workers": workers, "pairs": pairs, "routers": [{"ready": True}, {"ready": False}]}
    monkeypatch.setattr(Server, "state", lambda self: state)
    there = Server("", 1)
    assert there.missing(parse_shape("2P2D", COMMON)) == [server.link_name("prefill-0", "decode-1")]
    assert there.missing(parse_shape("2P2D --num-routers 2", COMMON))[1:] == ["1 routers"]
    del workers[3]["pid"]
    assert there.missing(parse_shape("2P2D", COMMON)) == ["1 workers"]
    workers[0]["role"] = workers[1]["role"] = workers[2]["role"] = "both"
    assert there.missing(parse_shape("3C", COMMON)) == []


def test_a_server_that_ends_says_why(tmp_path: Path) -> None:
    shape = parse_shape("1P1D", COMMON | {"model": "./nothing.gguf"})
    starting = server.serving(shape, log=tmp_path / "log", haproxy=False, timeout_s=PATIENCE_S)
    with pytest.raises(PdrayError, match=r"the server has ended \(2\): (.|\n)*there is no .*nothing.gguf"), starting:
        pass


def test_options_of_the_command_are_documented() -> None:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    assert all(action.help for action in parser._actions)
