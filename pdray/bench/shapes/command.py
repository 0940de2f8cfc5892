"""The command: start each shape once, offer each rate to it, tell and save what came of it."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from pdray.bench.sending import Sent, Target, send_from_processes
from pdray.bench.shapes.point import Point, make_point, parse_limit
from pdray.bench.shapes.report import table_head, table_row, write_page
from pdray.bench.shapes.server import Server, has_haproxy, serving
from pdray.bench.shapes.shape import Shape, parse_shape
from pdray.bench.workload import poisson_arrivals, random_requests
from pdray.errors import ConfigError, PdrayError
from pdray.options import add_config_arguments, config_values

TOKEN_IDS = range(1000, 30000)  # above special tokens
WARM_UP_OUTPUT_LEN = 32
FORMAT = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `pdray bench shapes`."""
    parser.add_argument("model", nargs="?", metavar="MODEL", help="as of `pdray serve`")
    load = parser.add_argument_group("load")
    load.add_argument(
        "--shapes",
        nargs="+",
        metavar="SHAPE",
        help='xPyD or xC (colocated), with options of `pdray serve`: 2P2D 4C "4C --max-num-batched-tokens 2048"',
    )
    load.add_argument("--rates", type=float, nargs="+", metavar="RATE", help="requests per second, Poisson")
    load.add_argument("--seconds", type=float, default=20.0, help="for which each rate is offered (default: 20)")
    load.add_argument("--input-len", type=int, default=2048, help="prompt tokens, random (default: 2048)")
    load.add_argument("--output-len", type=int, default=256, help="output tokens (default: 256)")
    load.add_argument("--warm-up", type=float, default=3.0, help="seconds at the first rate, not counted (default: 3)")
    load.add_argument("--num-client-processes", type=int, default=4, help="that send, in turn (default: 4)")
    load.add_argument("--request-timeout", type=float, default=120.0, help="seconds for one request (default: 120)")
    load.add_argument("--load-seed", type=int, default=0, help="of arrivals and prompts (default: 0)")
    load.add_argument(
        "--limits", nargs="+", default=["1000:15", "1000:8"], metavar="TTFT:TPOT", help="ms; default: 1000:15 1000:8"
    )
    load.add_argument(
        "--stop-below",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="leave a shape's higher rates out once fewer are within the first limit (default: 0)",
    )
    load.add_argument("--time-limit", type=float, help="begin nothing after so many seconds, and say what is left out")
    load.add_argument("--no-haproxy", action="store_true", help="Serve's own proxy, also where HAProxy is installed")
    result = parser.add_argument_group("result")
    result.add_argument("--save-result", type=Path, metavar="FILE", help="write everything as JSON")
    result.add_argument("--page", type=Path, metavar="FILE.md", help="write a page with a picture for each limit")
    result.add_argument(
        "--from-results", type=Path, nargs="+", metavar="FILE", help="measure nothing: make the --page of saved results"
    )
    add_config_arguments(parser)


def main(args: argparse.Namespace) -> int:
    """Returns 1 if a request failed (a refused one did not), or a shape could not be measured."""
    if args.from_results:
        if args.page is None or args.shapes or args.rates:
            raise ConfigError("--from-results makes a page of saved results: give --page, and no --shapes or --rates")
        write_page(args.page, [read_result(path) for path in args.from_results])
        return 0
    run = _Run(args)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the server ends too
    run.all_shapes()
    if args.page and run.points:
        write_page(args.page, [run.result()])
    return int(bool(run.failed) or any(point.counts["failed"] for point in run.points))


def read_result(path: Path) -> dict[str, Any]:
    """Raises:
    ConfigError: it cannot be read, or was not written by this command as it is today.
    """
    try:
        result: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"result {path} cannot be read: {error}") from error
    if not isinstance(result, dict) or result.get("format") != FORMAT:
        raise ConfigError(f"{path} is no result of `pdray bench shapes` (format {FORMAT})")
    return result


class _Run:
    """One run of the command.

    Attributes:
        left_out: loads that were not offered, and why. failed: shapes that could not be measured.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        """Raises:
        ConfigError: an option that cannot work; nothing was started.
        """
        self.args = args
        self.points: list[Point] = []
        self.left_out: list[str] = []
        self.failed: list[str] = []
        self.device = ""
        self.limits = [parse_limit(text) for text in args.limits]
        self.haproxy = not args.no_haproxy and has_haproxy()
        if not args.shapes or not args.rates:
            raise ConfigError("give --shapes and --rates: what to start, and what to offer to each of them")
        for rate in args.rates:
            if not 0 < rate < float("inf"):
                raise ConfigError(f"--rates {rate:g}: rates must be above 0 and finite")
        for name in ("seconds", "input_len", "output_len", "num_client_processes", "request_timeout"):
            if not getattr(args, name) > 0:
                raise ConfigError(f"--{name.replace('_', '-')} {getattr(args, name):g} must be above 0")
        common = config_values(args)
        self.shapes: list[Shape] = [parse_shape(text, common) for text in args.shapes]
        self._began = time.monotonic()

    def all_shapes(self) -> None:
        """Print a line of the table for each load."""
        print(table_head([str(limit) for limit in self.limits]), flush=True)
        for shape in self.shapes:
            try:
                if self._is_late():
                    self._leave_out(f"{shape.name}: no time was left")
                else:
                    self._one_shape(shape)
            except PdrayError as error:
                self.failed.append(f"{shape.name}: {error}")
                _say(self.failed[-1])
            if self.args.save_result:  # after each, so that what ends the next one loses nothing
                self.args.save_result.write_text(json.dumps(self.result(), indent=1) + "\n")

    def _one_shape(self, shape: Shape) -> None:
        with tempfile.TemporaryDirectory() as folder:
            timeout_s = float(shape.config.get("start_timeout_s", 600.0))
            log = Path(folder) / "serve.log"
            with serving(shape, log=log, haproxy=self.haproxy, timeout_s=timeout_s) as server:
                _say(f"{shape.name}: serves after {server.start_s:.1f} s")
                self.device = self.device or describe_devices(server.state())
                for point in self._points(shape, server):
                    self.points.append(point)
                    print(table_row(point), flush=True)
                    for error, count in point.errors.items():
                        _say(f"{shape.name} at {point.rate:g}: {count} x {error}")

    def _points(self, shape: Shape, server: Server) -> Iterator[Point]:
        args = self.args
        target = Target(f"{server.url}/v1/completions", server.state()["model"], True, args.request_timeout)
        if args.warm_up > 0:
            self._send(target, args.rates[0], args.warm_up, WARM_UP_OUTPUT_LEN, seed=args.load_seed + len(args.rates))
        for number, rate in enumerate(args.rates):
            if self._is_late():
                self._leave_out(f"{shape.name} at {rate:g} requests/s: no time was left")
                continue
            before = server.usage()
            sent = self._send(target, rate, args.seconds, args.output_len, seed=args.load_seed + number)
            after = server.usage()
            point = make_point(
                shape.name, shape.num_workers, rate, sent.records, sent.duration_s, before, after, self.limits
            )
            yield point
            share = point.within[str(self.limits[0])]
            if share < args.stop_below:
                for higher in args.rates[number + 1 :]:
                    self._leave_out(f"{shape.name} at {higher:g} requests/s: {share:.0%} at {rate:g} was few enough")
                return

    def _send(self, target: Target, rate: float, seconds: float, output_len: int, *, seed: int) -> Sent:
        rng = np.random.default_rng(seed)
        arrivals = poisson_arrivals(max(2, round(rate * seconds)), rate, 1.0, rng)
        requests = random_requests(
            arrivals,
            input_len=self.args.input_len,
            output_len=output_len,
            range_ratio=0.0,
            prefix_len=0,
            token_ids=TOKEN_IDS,
            rng=rng,
        )
        return send_from_processes(requests, target, self.args.num_client_processes)

    def _is_late(self) -> bool:
        limit_s = self.args.time_limit
        return limit_s is not None and time.monotonic() - self._began > limit_s

    def _leave_out(self, what: str) -> None:
        self.left_out.append(what)
        _say(f"left out: {what}")

    def result(self) -> dict[str, Any]:
        """What --save-result writes."""
        args = self.args
        load = {
            name: getattr(args, name)
            for name in ("input_len", "output_len", "seconds", "num_client_processes", "load_seed", "request_timeout")
        }
        return {
            "format": FORMAT,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": shlex.join(["pdray", *sys.argv[1:]]),
            "device": self.device,
            "load": load | {"proxy": "HAProxy" if self.haproxy else "Serve's own proxy"},
            "limits": [str(limit) for limit in self.limits],
            "points": [point.to_dict() for point in self.points],
            "left_out": self.left_out + self.failed,
        }


def describe_devices(state: dict[str, Any]) -> str:
    """What kinds of device an application's workers run on."""
    kinds = sorted({str(worker["device"]).partition(":")[0] for worker in state["workers"]})
    if kinds != ["cuda"]:
        return f"{', '.join(kinds)} ({os.cpu_count()} cores)"
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]  # torch would take memory on a GPU
    names = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()
    return ", ".join(sorted(set(names)))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
